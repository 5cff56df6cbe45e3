"""Texts and words with their classes: what transformers would label, on which token, and nothing mislabelled in silence."""

import pathlib

import numpy as np
import pytest
from tokenizers import AddedToken, pre_tokenizers, processors

from tuning.core.types import Batch
from tuning.data.dataset import dataset, preview
from tuning.data.formats import auto, labels, messages, pairs, tags, text
from tuning.data.reader import Reader

SST2 = pathlib.Path(__file__).parents[2].parent / "shared/data/sst2/train.tsv"
MOODS = ("bad", "good")
KINDS = ("O", "PER", "LOC")
ROWS = [{"text": "the cat", "label": "good"}, {"text": "how many apples", "label": 0}, {"text": "mat", "label": "1"}]


@pytest.fixture
def encoder(bert):
    return Reader(bert, kind="encoder", classes=MOODS, pool="first")


@pytest.fixture
def decoder(started):
    return Reader(started, classes=MOODS)


@pytest.fixture
def tagger(bert):
    return Reader(bert, kind="encoder", classes=KINDS, pool="first", per_token=True)


# A label for a text.


def test_an_encoder_is_labelled_at_its_first_token_and_a_decoder_at_its_last(encoder, decoder):
    for reader, place in ((encoder, 0), (decoder, -1)):
        for row, number, example in zip(ROWS, (1, 0, 1), labels()(reader)(ROWS), strict=True):
            assert example.tokens.tolist() == reader.tokenizer(row["text"])["input_ids"]
            assert np.flatnonzero(example.learned).tolist() == [place % len(example.tokens)]
            assert example.targets[place] == number
            assert example.types is None and example.inputs is None


def test_two_texts_have_the_types_that_the_tokenizer_gives_them(encoder, roberta):
    row = {"a": "the cat", "b": "on the mat", "y": 1}
    example = labels(text="a", pair="{b}!", label="y")(encoder)([row])[0]
    expected = encoder.tokenizer("the cat", "on the mat!", return_token_type_ids=True)
    assert example.tokens.tolist() == expected["input_ids"]
    assert example.types.tolist() == expected["token_type_ids"]
    assert example.types.max() == 1 and example.types.dtype == np.int32
    same = Reader(roberta, kind="encoder", classes=MOODS, pool="first")
    assert labels(text="a", pair="b", label="y")(same)([row])[0].types is None


def test_a_decoder_reads_two_texts_as_one_template(decoder):
    with pytest.raises(ValueError, match=r"a decoder reads one text\. Join the two .* format\.text='\{first\} \{second\}'"):
        labels(pair="b")(decoder)
    example = labels(text="{a} = {b}", label="y")(decoder)([{"a": "X", "b": "Y", "y": 0}])[0]
    assert decoder.tokenizer.decode(example.tokens) == "<s>X = Y"


@pytest.mark.parametrize("value", ["fine", "Good", "", None, 2, -1, "2", "-1", "1.0", 1.0, True, ["good"]])
def test_what_is_no_class_is_refused(encoder, value):
    with pytest.raises(ValueError, match=r"Column 'label' has .*, which is no class of the model \(bad, good\), nor a number from 0 to 1"):
        labels()(encoder)([{"text": "a", "label": value}])


def test_a_class_whose_name_is_a_number_is_meant_by_its_name(bert):
    reader = Reader(bert, kind="encoder", classes=("1", "0"), pool="first")
    assert [int(labels()(reader)([{"text": "a", "label": value}])[0].targets[0]) for value in ("1", "0", 1, 0)] == [0, 1, 1, 0]


def test_rows_of_classes_are_packed_and_padding_has_no_class(roberta, write):
    assert roberta.pad_token_id == 1
    rows = dataset(
        Reader(roberta, classes=MOODS), labels(), path=write("a.jsonl", [dict(row, label=str(row["label"])) for row in ROWS]), length=32
    )
    assert len(rows) == 1 and rows.classes == MOODS
    row = rows[0]
    ends = [len(roberta(each["text"])["input_ids"]) for each in ROWS]
    places = np.cumsum(ends) - 1
    assert np.flatnonzero(row.weights).tolist() == places.tolist()
    assert row.targets[places].tolist() == [1, 0, 1]
    assert row.targets.sum() == 2
    assert row.segments[places].tolist() == [1, 2, 3]
    assert rows.report.learned == 3
    assert row.types is None and row.inputs is None


@pytest.mark.parametrize("pool", ["first", "last"])
@pytest.mark.parametrize("name", ["bert", "started"])
def test_truncation_cuts_the_text_and_keeps_the_label(request, name, pool, write):
    tokenizer = request.getfixturevalue(name)
    reader = Reader(tokenizer, kind="encoder", classes=MOODS, pool=pool)
    body = "the cat sat on the mat"
    rows = dataset(reader, labels(), path=write("a.jsonl", [{"text": body, "label": "good"}]), length=6)
    assert rows.report.truncated == 1
    assert rows[0].tokens.tolist() == tokenizer(body, truncation=True, max_length=6)["input_ids"]
    assert np.flatnonzero(rows[0].weights).tolist() == [0 if pool == "first" else 5]
    assert rows[0].targets.tolist().count(1) == rows[0].targets[0 if pool == "first" else 5] == 1


def test_types_are_cut_with_their_tokens(encoder, write):
    path = write("a.jsonl", [{"text": "the cat sat on", "pair": "the mat", "label": 1}, {"text": "a", "pair": "b", "label": 0}])
    rows = dataset(encoder, labels(pair="pair"), path=path, length=8, pack=False)
    settings = dict(return_token_type_ids=True, truncation=True, max_length=8)
    expected = encoder.tokenizer("the cat sat on", "the mat", **settings)
    assert rows[0].tokens.tolist() == expected["input_ids"]
    assert rows[0].types.tolist() == expected["token_type_ids"]
    assert rows[1].types.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert rows.abstract.types.shape == (8,)


def test_a_label_is_not_split_from_its_text(encoder, write):
    path = write("a.jsonl", [{"text": "the cat " * 9, "label": 1}])
    with pytest.raises(ValueError, match=r"row 0: Its \d+ tokens would lose their context if split"):
        dataset(encoder, labels(), path=path, length=8, overlong="split")
    with pytest.raises(ValueError, match=r"row 0: The 2 tokens that the tokenizer puts around a text leave no room"):
        dataset(encoder, labels(), path=path, length=2)


def test_a_wrong_label_names_its_row(encoder, write):
    path = write("a.jsonl", [*ROWS[:1] * 1102, {"text": "a", "label": "fine"}])
    with pytest.raises(ValueError, match=r"a\.jsonl, row 1102: Column 'label' has 'fine', which is no class"):
        dataset(encoder, labels(), path=path)


def test_a_text_without_a_token_is_refused(plain):
    with pytest.raises(ValueError, match="The text is empty"):
        labels()(Reader(plain, classes=MOODS))([{"text": "", "label": 0}])


def test_the_preview_names_the_classes_where_they_stand(encoder, decoder, tagger, write):
    path = write("a.jsonl", ROWS[:1])
    assert preview(dataset(encoder, labels(), path=path, length=8), encoder.tokenizer).split("\n")[2] == "[CLS]«good» the cat [SEP]"
    shown = preview(dataset(decoder, labels(), path=path, length=8), decoder.tokenizer)
    assert shown == "row 0: 3 tokens, 1 of them learned «so», 5 padding\n--- example 1\n<s>the cat«good»"
    words = write("b.jsonl", [{"tokens": ["the", "cat", "sat"], "tags": ["O", "PER", "LOC"]}])
    shown = preview(dataset(tagger, tags(), path=words, length=8), tagger.tokenizer)
    assert shown.split("\n")[2] == "[CLS] the«O» cat«PER» sat«LOC» [SEP]"


def test_auto_labels_for_a_model_that_classifies(encoder, tagger, decoder, plain):
    assert auto()(encoder)(ROWS[:1])[0].targets[0] == 1
    assert auto()(tagger)([{"tokens": ["the"], "tags": [2]}])[0].targets[1] == 2
    assert auto()(Reader(plain))(ROWS[:1])[0].learned.sum() == len(plain("the cat")["input_ids"])
    with pytest.raises(ValueError, match="no format fits: labels needs 'text' and 'label'"):
        auto()(decoder)([{"text": "a"}])
    with pytest.raises(ValueError, match="no format fits: tags needs 'tokens' and 'tags'"):
        auto()(tagger)(ROWS[:1])


def test_formats_and_heads_that_do_not_go_together_are_refused(encoder, decoder, tagger, bert, plain, t5):
    silent = Reader(bert, kind="encoder", pool="first")
    translator = Reader(t5, kind="encoder_decoder", start=0)
    for format, reader, message in (
        (text(), encoder, r"chooses among its classes. Set format\.name=labels"),
        (pairs(), decoder, r"chooses among its classes. Set format\.name=labels"),
        (messages(), tagger, r"chooses among its classes. Set format\.name=tags"),
        (text(), silent, r"which an encoder does not. Set model\.head=sequence_classification and format\.name=labels"),
        (pairs(), silent, "which an encoder does not"),
        (labels(), silent, r"Set model\.head=sequence_classification, and model\.classes"),
        (tags(), Reader(plain), r"Set model\.head=token_classification, and model\.classes"),
        (labels(), tagger, r"classifies every token, .*Set format\.name=tags"),
        (tags(), encoder, r"classifies the whole text, .*Set format\.name=labels"),
        (labels(), translator, r"says the class's name: set format\.name=pairs"),
        (tags(), translator, r"set format\.name=pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            format(reader)


# A tag for each word.

WORDS = ["The", "moonmat", "sat", "on", "q?x", "12"]
TAGS = ["O", "PER", -100, "2", 1, "O"]
NUMBERS = [0, 1, -100, 2, 1, 0]


def aligned(tokenizer, words, numbers, at):
    """Labels as transformers' examples align them: by the words that the tokenizer says each token is of."""
    found = tokenizer(words, is_split_into_words=True)
    of = found.word_ids()
    spread = [-100] * len(of)
    for i, word in enumerate(of):
        beside = of[i - 1] if at == "first" and i else of[i + 1] if at == "last" and i + 1 < len(of) else None
        if word is not None and word != beside:
            spread[i] = numbers[word]
    return found["input_ids"], spread


def prefixed(tokenizer):
    """Byte-level with a space before the first word too: transformers splits words for no other kind."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@pytest.mark.parametrize("at", ["first", "last"])
@pytest.mark.parametrize("name", ["bert", "t5", "roberta", "plain"])
def test_tags_stand_where_transformers_aligns_them(request, name, at):
    tokenizer = request.getfixturevalue(name)
    words = ["The", "☃", *WORDS]  # an unknown word, and one of several tokens for one character
    numbers = [2, 1, *NUMBERS]
    reader = Reader(tokenizer, kind="encoder", classes=KINDS, pool="first", per_token=True)
    if name in ("roberta", "plain"):
        prefixed(tokenizer)
        if name == "roberta":
            tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=True)
    tokens, spread = aligned(tokenizer, words, numbers, at)
    example = tags(at=at)(reader)([{"tokens": words, "tags": ["LOC", 1, *TAGS]}])[0]
    assert example.tokens.tolist() == tokens
    assert np.where(example.learned, example.targets, -100).tolist() == spread
    assert len(tokens) > len(words) + 2
    assert (np.array(spread) >= 0).sum() == 7


def test_words_are_tokenised_as_in_a_sentence(plain):
    reader = Reader(plain, classes=KINDS, per_token=True)
    example = tags(at="last")(reader)([{"tokens": WORDS, "tags": TAGS}])[0]
    assert example.tokens.tolist() == plain(" ".join(WORDS))["input_ids"]
    ends = np.cumsum([len(plain((" " if i else "") + word)["input_ids"]) for i, word in enumerate(WORDS)]) - 1
    assert np.flatnonzero(example.learned).tolist() == [end for end, tag in zip(ends, TAGS, strict=True) if tag != -100]


def test_words_and_tags_may_be_texts(tagger):
    lists = tags()(tagger)([{"tokens": WORDS, "tags": TAGS}])[0]
    texts = tags(tokens="w", tags="t")(tagger)([{"w": " ".join(WORDS), "t": "O PER -100 LOC 1 0"}])[0]
    assert lists.targets.tolist() == texts.targets.tolist()
    assert lists.learned.tolist() == texts.learned.tolist()


def test_truncation_keeps_the_tags_of_the_tokens_that_stay(tagger, write):
    path = write("a.jsonl", [{"tokens": ["the", "cat", "sat", "on", "mat"], "tags": [0, 1, 2, 1, 2]}])
    rows = dataset(tagger, tags(), path=path, length=5)
    assert rows[0].tokens.tolist() == tagger.tokenizer("the cat sat on mat", truncation=True, max_length=5)["input_ids"]
    assert rows[0].targets.tolist() == [0, 0, 1, 2, 0]
    assert rows[0].weights.tolist() == [0, 1, 1, 1, 0]
    late = write("b.jsonl", [{"tokens": ["the"] * 9, "tags": ["-100"] * 8 + ["O"]}, {"tokens": ["the"], "tags": ["O"]}])
    with pytest.raises(ValueError, match="row 0: What is learned begins at token 10 of 11"):
        dataset(tagger, tags(), path=late, length=5)
    assert dataset(tagger, tags(), path=late, length=5, unlearned="drop").report.cut_away == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "Column 'tokens' has 2 words, and column 'tags' 1 tags"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "Column 'tokens', word 1 is ''; words are text, and not empty"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "word 1 is ' '"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "word 1 is None"),
        ({"tokens": [], "tags": []}, "Column 'tokens' has no words"),
        ({"tokens": "", "tags": ""}, "Column 'tokens' has no words"),
        ({"tokens": None, "tags": ["O"]}, "Column 'tokens' is None; a list, or a text"),
        ({"tokens": ["a"], "tags": 1}, "Column 'tags' is 1; a list, or a text"),
        ({"tokens": ["a"], "tags": ["B-PER"]}, r"Column 'tags' has 'B-PER', which is no class of the model \(O, PER, LOC\)"),
        ({"tokens": ["a"], "tags": [None]}, "Column 'tags' has None, which is no class"),
        ({"tokens": ["a"], "tags": [3]}, "Column 'tags' has 3, which is no class of the model .* nor a number from 0 to 2"),
        ({"tokens": ["a", "\u200b\x00"], "tags": ["O", "PER"]}, r"no token of the word .*Remove it, or set its tag to -100"),
        ({"words": ["a"], "tags": ["O"]}, "There is no column 'tokens'; the columns are 'words', 'tags'"),
    ],
)
def test_a_wrong_row_of_tags_says_what_is_there(tagger, row, message):
    with pytest.raises(ValueError, match=message):
        tags()(tagger)([row])


def test_a_word_without_a_token_may_stay_without_a_tag(tagger):
    example = tags()(tagger)([{"tokens": ["\x00", "cat", "\x00"], "tags": [-100, "PER", -100]}])[0]
    assert example.targets[example.learned].tolist() == [1]


def test_two_words_in_one_token_are_refused(spaced):
    spaced.backend_tokenizer.add_tokens(["cat are"])
    with pytest.raises(ValueError, match="joins the words 'cat' and 'are' in one token"):
        tags()(Reader(spaced, classes=KINDS, per_token=True))([{"tokens": ["The", "cat", "are"], "tags": [0, 1, 2]}])


def test_a_space_after_a_word_is_no_part_of_the_next(plain):
    plain.backend_tokenizer.add_tokens([AddedToken("cat ", normalized=False)])
    example = tags()(Reader(plain, classes=KINDS, per_token=True))([{"tokens": ["The", "cat", "X"], "tags": [0, 1, 2]}])[0]
    assert plain.convert_ids_to_tokens(example.tokens) == ["The", "Ġ", "cat ", "X"]
    assert example.learned.tolist() == [True, True, False, True]


def test_at_names_what_exists():
    with pytest.raises(ValueError, match=r"format\.at='all' is not one of first, last"):
        tags(at="all")


@pytest.mark.skipif(not SST2.exists(), reason=f"the data folder is not here: {SST2}")
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_real_sentences_and_their_sentiment(bert, started, kind):
    reader = Reader(bert, "encoder", MOODS, "first") if kind == "encoder" else Reader(started, "decoder", MOODS)
    rows = dataset(reader, labels(), path=str(SST2), split="train[:500]", columns=("text", "label"), length=512)
    report = rows.report
    assert (report.examples, report.learned, report.dropped) == (500, 500, 0)
    assert isinstance(rows[0], Batch)
    batches = [rows[i] for i in range(len(rows))]
    expected = [line.rsplit("\t", 1)[1].strip() for line in SST2.read_text().split("\n")[:500]]
    assert sum(int((row.targets * row.weights).sum()) for row in batches) == expected.count("1") > 200
    assert "«good»" in preview(rows, reader.tokenizer) or "«bad»" in preview(rows, reader.tokenizer)
