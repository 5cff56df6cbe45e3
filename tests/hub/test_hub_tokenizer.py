"""Tokenizers: from tokenizer.json, and from a SentencePiece model against the sentencepiece library."""

import json
import random

import pytest

from tuning.hub import files, tokenizer

spm = pytest.importorskip("sentencepiece")

CORPUS = [
    "The quick brown fox jumps over the lazy dog.", "A man, a plan, a canal: Panama!", "café naïve déjà vu, élève", "to be or not to be,",
    "that is the question: whether it is nobler in the mind", "to suffer the slings and arrows of outrageous fortune", "x  y   z",
    "aaaa aaa baa",
    "or to take arms against a sea of troubles and by opposing end them.",
] * 5  # fmt: skip
HARD = [
    "", " ", "  ", "Hello world", " leading", "   three leading", "a  b   c", "trailing  ",
    "café déjà ½ ﬁ", "😀 ok 🇫🇷 👩‍👩‍👧", "日本語",
    "\tTab\nnew\n\nline",
    "aaaaaaa baaaab", "ａｂｃ", "e\u0301", "\u00a0nb\u3000sp", "zero\u200bwidth", "▁a", "<0x41> <0x0A>",
]  # fmt: skip
LLAMA = dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
KINDS = {
    "llama": dict(model_type="bpe", **LLAMA),
    "bpe": dict(model_type="bpe"),
    "unigram": dict(model_type="unigram", byte_fallback=True),
    "unigram_llama": dict(model_type="unigram", **LLAMA),
    "no_prefix": dict(model_type="bpe", add_dummy_prefix=False, byte_fallback=True),
}


def train(directory, **settings):
    bytes_ = 256 if settings.get("byte_fallback") else 0
    with (directory / "tokenizer.model").open("wb") as file:
        given = dict(vocab_size=100 + bytes_, minloglevel=2, hard_vocab_limit=False, **settings)
        spm.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=file, **given)
    return directory


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = train(tmp_path_factory.mktemp(kind), **KINDS[kind])
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_model_gives_the_librarys_ids(kind, model_of):
    library = spm.SentencePieceProcessor(model_file=str(model_of(kind) / "tokenizer.model"))
    ours = tokenizer.load(model_of(kind))
    rng = random.Random(0)
    texts = HARD + ["".join(rng.choices("abcdetho  .,\n'éA😀", k=rng.randrange(1, 40))) for _ in range(300)]
    for text in texts:
        ids = library.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        if library.unk_id() not in ids:
            assert ours.decode(ids) == library.decode(ids), text
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (library.bos_id(), library.eos_id(), library.unk_id())
    assert len(ours) == library.get_piece_size()


@pytest.mark.parametrize("kind", ["llama", "unigram"])
def test_control_tokens_are_found_only_where_they_may_be(kind, model_of):
    library = spm.SentencePieceProcessor(model_file=str(model_of(kind) / "tokenizer.model"))
    ours, text = tokenizer.load(model_of(kind)), "so <s> or </s> <unk>"
    assert ours.encode(text, add_special_tokens=False, split_special_tokens=True) == library.encode(text)
    assert {1, 2} <= set(ours.encode(text, add_special_tokens=False))


def test_the_folders_settings_are_honoured(tmp_path, model_of):
    source = model_of("llama")
    (tmp_path / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    size = len(tokenizer.load(source))
    added = {str(size): {"content": "<pad>", "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}}
    given = {
        "tokenizer_class": "NoSuchTokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "add_eos_token": True,
        "pad_token": "<pad>",
        "added_tokens_decoder": added, "model_max_length": 77,
    }  # fmt: skip
    files.write_json(tmp_path / "tokenizer_config.json", given)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    ours = tokenizer.load(tmp_path)
    assert ours.encode("to be")[0] == 1 and ours.encode("to be")[-1] == 2
    assert tokenizer.load(source).encode("to be")[0] == 1 and tokenizer.load(source).encode("to be")[-1] != 2
    assert ours.pad_token_id == size and ours.model_max_length == 77
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi|"


def test_a_saved_tokenizer_is_the_same_one(tmp_path, model_of):
    from transformers import AutoTokenizer

    ours = tokenizer.load(model_of("llama"))
    ours.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save(ours, tmp_path)
    for again in (tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert all(again.encode(text) == ours.encode(text) for text in HARD)
        assert again.chat_template == ours.chat_template
        assert (again.bos_token_id, again.eos_token_id) == (1, 2)


def test_a_folder_without_tokenizer_files_has_none(tmp_path):
    assert tokenizer.load(tmp_path) is None


def test_a_tokenizer_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has vocab.json, but neither"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # the other format of that name
    with pytest.raises(ValueError, match=r"tokenizer.model is not a SentencePiece model"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize("settings", [dict(user_defined_symbols=["<sep>"]), dict(model_type="char"), dict(treat_whitespace_as_suffix=True)])
def test_a_sentencepiece_model_that_cannot_be_followed_exactly_is_refused(settings, tmp_path):
    with pytest.raises(ValueError, match="SentencePiece"):
        tokenizer.load(train(tmp_path, **{"model_type": "bpe", **settings}))


def test_stop_ids_are_gathered_from_everywhere(tmp_path, model_of):
    ours = tokenizer.load(model_of("llama"))
    assert tokenizer.stop_ids(None, ours) == (2,)
    assert tokenizer.stop_ids(tmp_path, None) == ()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert tokenizer.stop_ids(tmp_path, ours) == (2, 7, 9)
