"""Tiny tokenizers, made here, and a cache of the data library that no test shares with the user."""

import pathlib

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests import words

SENTENCES = [
    "The cat sat on the mat and looked at the moon.",
    "Question: how many apples are there?\nAnswer: there are 12 apples.",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi there<|im_end|>\n",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory):
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = pathlib.Path(tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


def bytelevel(special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def wrap(tokenizer, **settings):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


@pytest.fixture
def plain():
    """Byte-level, no start token, and the end token is the padding too."""
    return wrap(bytelevel(["</s>"]), eos_token="</s>", pad_token="</s>")


@pytest.fixture
def endless():
    return wrap(bytelevel([]))


@pytest.fixture
def started():
    """Puts <s> before a text by default."""
    tokenizer = bytelevel(["<pad>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def chat():
    tokenizer = wrap(bytelevel(["<|im_start|>", "<|im_end|>"]), eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def spaced():
    """Puts a space before every text, as SentencePiece models of the Llama 2 kind do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer.add_special_tokens([AddedToken("<unk>"), AddedToken("<s>"), AddedToken("</s>")])
    letters = sorted({letter for sentence in SENTENCES for letter in sentence})
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(["The", "cat", "are"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def bert():
    """Lower-cased pieces of words, in the frame [CLS] a [SEP] b [SEP]."""
    return words.bert(SENTENCES, 100)


@pytest.fixture
def t5():
    """Unigrams with a space before every word, and </s> after a text."""
    return words.t5(SENTENCES[:2], 60)


@pytest.fixture
def roberta():
    """Byte-level, in the frame <s> a </s></s> b </s>; every type is 0."""
    tokenizer = bytelevel(["<s>", "<pad>", "</s>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", cls_token="<s>", sep_token="</s>")


@pytest.fixture
def write(tmp_path):
    """write(name, text or bytes, rows as JSON lines) -> path as text."""
    import json

    def file(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return file
