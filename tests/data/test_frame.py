"""Whole texts in their tokenizer's frame, against transformers; and encoder-decoders, which read and say such texts."""

import itertools
import pathlib

import numpy as np
import pytest

from tuning.data.dataset import dataset, preview
from tuning.data.formats import auto, messages, pairs, text
from tuning.data.frame import frame
from tuning.data.reader import Reader

E2E = pathlib.Path(__file__).parents[2].parent / "shared/data/e2e/devset.csv"
TEXTS = ["The cat sat on the mat", "how many apples", "", "é ☃ the  moon"]
BATCH = ("tokens", "targets", "weights", "segments", "positions")


@pytest.fixture
def translator(t5):
    return Reader(t5, kind="encoder_decoder", start=t5.pad_token_id)


@pytest.fixture
def tokenizers(bert, t5, roberta, started, plain):
    return {"bert": bert, "t5": t5, "roberta": roberta, "started": started, "plain": plain}


@pytest.mark.parametrize("name", ["bert", "t5", "roberta", "started", "plain"])
def test_a_framed_text_has_the_tokens_and_types_of_the_tokenizer(tokenizers, name):
    tokenizer = tokenizers[name]
    seconds = [None, TEXTS[::-1]] if name in ("bert", "t5", "roberta") else [None]
    for other in seconds:
        expected = tokenizer(TEXTS, other, return_token_type_ids=True)
        around = frame(tokenizer, pair=other is not None)
        for number, framed in enumerate(around.encode(TEXTS, other)):
            assert framed.tokens.tolist() == expected["input_ids"][number]
            assert framed.types.tolist() == expected["token_type_ids"][number]
            assert framed.tokens.dtype == framed.types.dtype == np.int32
        assert around.typed == (name == "bert" and other is not None)


def test_a_control_token_that_a_text_spells_is_letters(bert, roberta):
    assert frame(bert).encode(["the [SEP] cat [CLS]"])[0].tokens.tolist().count(bert.sep_token_id) == 1
    framed = frame(roberta, pair=True).encode(["a</s>"], ["<s>b<pad>"])[0]
    assert roberta.decode(framed.tokens) == "<s>a</s></s></s><s>b<pad></s>"
    assert np.isin(framed.tokens, roberta.all_special_ids).sum() == 4


def test_a_tokenizer_that_makes_a_control_token_of_text_is_refused(t5):
    with pytest.raises(ValueError, match=r"makes a control token of plain text: 'the </s>'"):
        frame(t5).encode(["cat", "the </s>"])


@pytest.mark.parametrize("name", ["bert", "t5", "roberta", "started"])
def test_a_text_is_cut_as_transformers_cuts_it(tokenizers, name):
    tokenizer = tokenizers[name]
    pair = name != "started"
    around = frame(tokenizer, pair=pair)
    for first, second in itertools.product(["the " * n for n in range(6)], repeat=2):
        tokens = around.encode([first], [second] if pair else None)[0].tokens
        for length in range(5, len(tokens) + 2):
            expected = tokenizer([first], [second] if pair else None, truncation=True, max_length=length)["input_ids"][0]
            assert tokens[around.trim(tokens, length)].tolist() == expected


def test_a_length_without_room_for_text_is_refused(bert):
    around = frame(bert)
    tokens = around.encode(["the cat"])[0].tokens
    assert len(around.trim(tokens, 3)) == 3
    with pytest.raises(ValueError, match=r"The 2 tokens that the tokenizer puts around a text leave no room for it in 2\."):
        around.trim(tokens, 2)


def test_two_texts_with_nothing_between_them_are_refused(plain, started):
    for tokenizer in (plain, started):
        with pytest.raises(ValueError, match=r"puts nothing between two texts\. Join them in one template"):
            frame(tokenizer, pair=True)


# Encoder-decoders.

PAIRS = [
    {"prompt": "how many apples", "completion": "there are 12"},
    {"prompt": "the cat", "completion": "the mat and the moon"},
    {"prompt": "?", "completion": "are"},
]


def test_the_encoder_reads_the_prompt_and_the_decoder_says_the_completion(translator, t5):
    for row, example in zip(PAIRS, pairs()(translator)(PAIRS), strict=True):
        labels = t5(text_target=row["completion"])["input_ids"]
        assert example.inputs.tolist() == t5(row["prompt"])["input_ids"]
        assert example.targets.tolist() == labels
        assert example.tokens.tolist() == [t5.pad_token_id, *labels[:-1]]
        assert example.learned.all()
        assert {str(x.dtype) for x in (example.inputs, example.targets, example.tokens)} == {"int32"}


def test_a_frame_around_the_completion_is_said_whole_and_an_end_is_added_where_it_has_none(roberta, plain):
    bart = Reader(roberta, kind="encoder_decoder", start=roberta.eos_token_id)
    example = pairs()(bart)([{"prompt": "a", "completion": "the"}])[0]
    assert roberta.convert_ids_to_tokens(example.inputs) == ["<s>", "a", "</s>"]
    assert roberta.convert_ids_to_tokens(example.tokens) == ["</s>", "<s>", "the"]
    assert roberta.convert_ids_to_tokens(example.targets) == ["<s>", "the", "</s>"]
    bare = pairs()(Reader(plain, kind="encoder_decoder", start=5))([{"prompt": "a", "completion": "XY"}])[0]
    assert bare.tokens.tolist() == [5, *plain.convert_tokens_to_ids(["X", "Y"])]
    assert bare.targets.tolist() == [*plain.convert_tokens_to_ids(["X", "Y"]), plain.eos_token_id]


def test_the_segments_of_encoder_and_decoder_match(translator, t5, write):
    rows = dataset(translator, pairs(), path=write("a.jsonl", PAIRS), length=64, input_length=48)
    assert len(rows) == 1
    row = rows[0]
    assert row.inputs.tokens.shape == (48,) and row.tokens.shape == (64,)
    for segment, pair in enumerate(PAIRS, 1):
        read, said = row.inputs.segments == segment, row.segments == segment
        labels = t5(pair["completion"])["input_ids"]
        assert row.inputs.tokens[read].tolist() == t5(pair["prompt"])["input_ids"]
        assert row.targets[said].tolist() == labels
        assert row.tokens[said].tolist() == [0, *labels[:-1]]
        assert row.positions[said].tolist() == list(range(said.sum()))
        assert row.inputs.positions[read].tolist() == list(range(read.sum()))
    assert row.weights.tolist() == (row.segments > 0).tolist()
    assert rows.report.tokens == (row.segments > 0).sum()
    assert rows.report.input_tokens == (row.inputs.segments > 0).sum()
    assert rows.report.learned == rows.report.tokens
    assert rows.report.padding_share == pytest.approx(1 - (rows.report.tokens + rows.report.input_tokens) / (64 + 48))
    assert str(rows.report).startswith("3 examples in 1 rows of 64 after 48 of the encoder: ")


def test_a_row_says_its_shapes(translator, bert, write):
    rows = dataset(translator, pairs(), path=write("a.jsonl", PAIRS), length=64, pack=False)
    assert len(rows) == 3
    for name in BATCH:
        assert getattr(rows.abstract, name).shape == (64,)
        assert getattr(rows.abstract, name).dtype == getattr(rows[1], name).dtype
    assert rows.abstract.inputs.tokens.shape == rows[2].inputs.segments.shape == (64,)
    assert rows.abstract.types is None


def test_both_texts_are_cut_to_their_own_lengths_and_counted(translator, t5, write):
    path = write("a.jsonl", [{"prompt": "the cat " * 5, "completion": "the"}, {"prompt": "the", "completion": "moon " * 9}, *PAIRS[2:]])
    rows = dataset(translator, pairs(), path=path, length=10, input_length=8, pack=False)
    report = rows.report
    assert (report.truncated, report.inputs_truncated, report.dropped) == (1, 1, 0)
    assert "1 truncated, 1 with the encoder's text truncated" in str(report)
    assert rows[0].inputs.tokens.tolist() == t5("the cat " * 5, truncation=True, max_length=8)["input_ids"]
    moons = t5("moon " * 9)["input_ids"]
    assert rows[1].tokens.tolist() == [0, *moons[:9]]
    assert rows[1].targets.tolist() == moons[:10]
    assert rows[1].weights.min() == 1
    assert dataset(translator, pairs(), path=path, length=10, input_length=8, overlong="drop").report.dropped == 2
    with pytest.raises(ValueError, match=r"row 0: It has \d+ tokens, and overlong='error' allows input_length=8"):
        dataset(translator, pairs(), path=path, length=10, input_length=8, overlong="error")
    with pytest.raises(ValueError, match=r"row 0: Its \d+ tokens would lose their context if split"):
        dataset(translator, pairs(), path=path, length=10, input_length=8, overlong="split")


def test_an_encoder_as_long_as_the_decoder_is_the_default_and_others_have_none(translator, plain, write):
    path = write("a.jsonl", PAIRS)
    assert dataset(translator, pairs(), path=path, length=40).input_length == 40
    for reader, length in ((Reader(plain), 40), (translator, 1)):
        with pytest.raises(ValueError, match=f"input_length={length} is for the encoder of an encoder-decoder"):
            dataset(reader, pairs(), path=path, length=40, input_length=length)


def test_the_preview_shows_what_is_read_and_what_is_said(translator, write):
    shown = preview(dataset(translator, pairs(), path=write("a.jsonl", PAIRS[1:]), length=40), translator.tokenizer)
    lines = shown.split("\n")
    assert "; in the encoder " in lines[0]
    assert lines[1:4] == ["--- example 1", "the cat</s>", "--- and its answer"]
    assert lines[4] == "<pad>« the mat and the moon</s>»"


def test_what_an_encoder_decoder_does_not_read_is_refused(translator, plain):
    for format in (text(), messages()):
        with pytest.raises(ValueError, match=r"reads one text and says another, .*Set format\.name=pairs"):
            format(translator)
    with pytest.raises(ValueError, match=r"Set format\.name=pairs"):
        auto()(translator)([{"text": "a"}])
    assert auto()(translator)(PAIRS)[0].inputs is not None
    with pytest.raises(ValueError, match="prompt is empty"):
        pairs()(Reader(plain, kind="encoder_decoder", start=0))([{"prompt": "", "completion": "a"}])
    with pytest.raises(ValueError, match="needs a start token: decoder_start_token_id"):
        Reader(plain, kind="encoder_decoder")


def test_a_reader_is_of_a_known_kind(plain):
    for key, value in (("kind", "both"), ("pool", "mean")):
        with pytest.raises(ValueError, match=f"{key}='{value}' is not one of"):
            Reader(plain, **{key: value})


@pytest.mark.skipif(not E2E.exists(), reason=f"the data folder is not here: {E2E}")
def test_real_meanings_and_sentences(translator):
    rows = dataset(translator, pairs(prompt="mr", completion="ref"), path=str(E2E), split="train[:300]", length=512, input_length=768)
    report = rows.report
    assert (report.examples, report.dropped, report.truncated, report.inputs_truncated) == (300, 0, 0, 0)
    count = 0
    for row in (rows[i] for i in range(len(rows))):
        assert set(row.segments.tolist()) - {0} == set(row.inputs.segments.tolist()) - {0}
        count += row.segments.max()
    assert count == 300
    assert len(rows) <= 1.1 * max(report.tokens / 512, report.input_tokens / 768) + 1
