"""A data set as rows of tokens: targets and weights counted by hand, and nothing lost or changed in silence."""

import pathlib
import time

import numpy as np
import pytest

from tuning.core import parts
from tuning.data.dataset import dataset, preview
from tuning.data.formats import messages, pairs, text
from tuning.data.reader import Reader

GSM8K = pathlib.Path(__file__).parents[2].parent / "shared/data/gsm8k/train.jsonl"

# With `plain` every capital letter is one token: it is in no merge.
PAIRS = [{"prompt": "XY", "completion": "Z"}, {"prompt": "X", "completion": "YZ"}, {"prompt": "Z", "completion": "ZZ"}]


def tokens_of(tokenizer, letters):
    return [tokenizer.eos_token_id if letter == "." else tokenizer.convert_tokens_to_ids(letter) for letter in letters]


def test_targets_weights_segments_and_positions_of_a_packed_row(plain, write):
    rows = dataset(Reader(plain), pairs(), path=write("a.jsonl", PAIRS), length=10)
    assert len(rows) == 2
    row = rows[0]
    pad = plain.pad_token_id
    assert row.tokens.tolist() == [*tokens_of(plain, "XYZ.XYZ."), pad, pad]
    assert row.targets.tolist() == [*tokens_of(plain, "YZ."), pad, *tokens_of(plain, "YZ."), pad, pad, pad]
    assert row.weights.tolist() == [0, 1, 1, 0, 1, 1, 1, 0, 0, 0]
    assert row.segments.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 0]
    assert {str(x.dtype) for x in (row.tokens, row.targets, row.segments, row.positions)} == {"int32"}
    assert row.weights.dtype == np.float32


def test_a_padded_row_holds_one_example_and_learns_its_end(plain, write):
    rows = dataset(Reader(plain), pairs(), path=write("a.jsonl", PAIRS), length=6, pack=False)
    assert len(rows) == 3
    assert plain.pad_token_id == plain.eos_token_id
    row = rows[2]
    assert row.tokens.tolist() == tokens_of(plain, "ZZZ...")
    assert row.targets[:3].tolist() == tokens_of(plain, "ZZ.")
    assert row.weights.tolist() == [1, 1, 1, 0, 0, 0]
    assert row.segments.tolist() == [1, 1, 1, 1, 0, 0]


def test_the_report_counts(plain, write):
    report = dataset(Reader(plain), pairs(), path=write("a.jsonl", PAIRS), length=10).report
    assert (report.examples, report.rows, report.tokens, report.learned) == (3, 2, 12, 8)
    assert report.learned_share == 8 / 12
    assert report.padding_share == pytest.approx(8 / 20)
    assert str(report) == "3 examples in 2 rows of 10: 12 tokens, 8 learned (66.7%), padding 40.0%"


def test_no_token_is_lost_in_packing(plain, write):
    rows = dataset(Reader(plain), text(), path=write("a.txt", "\n".join("XYZ" * n for n in range(1, 30))), length=100)
    seen = []
    for row in (rows[i] for i in range(len(rows))):
        for segment in range(1, row.segments.max() + 1):
            seen.append(plain.decode(row.tokens[row.segments == segment].tolist()))
    assert sorted(seen, key=len) == ["XYZ" * n + "</s>" for n in range(1, 30)]
    assert rows.report.learned == sum(rows[i].weights.sum() for i in range(len(rows)))


LONG = [{"prompt": "X", "completion": "YYYYYYYY"}, {"prompt": "X", "completion": "Y"}]
CUT = [{"prompt": "XXXXXXXX", "completion": "Y"}, {"prompt": "X", "completion": "Y"}]


def test_truncation_is_counted(plain, write):
    rows = dataset(Reader(plain), pairs(), path=write("a.jsonl", LONG), length=6, pack=False)
    assert rows[0].tokens.tolist() == tokens_of(plain, "XYYYYY")
    assert rows[0].weights.tolist() == [1, 1, 1, 1, 1, 0]
    assert rows[0].targets.tolist() == [*tokens_of(plain, "YYYYY"), plain.pad_token_id]
    assert (rows.report.truncated, rows.report.dropped) == (1, 0)
    assert "1 truncated" in str(rows.report)


def test_overlong_examples_are_dropped_or_refused_on_request(plain, write):
    path = write("a.jsonl", LONG)
    rows = dataset(Reader(plain), pairs(), path=path, length=6, overlong="drop")
    assert (len(rows), rows.report.dropped, rows.report.truncated) == (1, 1, 0)
    with pytest.raises(ValueError, match="row 0: It has 10 tokens, and overlong='error' allows length=6"):
        dataset(Reader(plain), pairs(), path=path, length=6, overlong="error")


@pytest.mark.parametrize("count", [5, 6, 7, 11, 12, 16, 17])
def test_splitting_learns_every_token_once(plain, write, count):
    letters = ("XYZW" * 5)[:count]
    rows = dataset(Reader(plain), text(), path=write("a.txt", letters), length=6, overlong="split", pack=False)
    learned = [t for i in range(len(rows)) for t in rows[i].targets[rows[i].weights > 0].tolist()]
    assert learned == tokens_of(plain, letters[1:] + ".")
    assert rows.report.split == (count + 1 > 6)


def test_splitting_a_prompt_from_its_answer_is_refused(plain, write):
    with pytest.raises(ValueError, match="row 0: Its 10 tokens would lose their prompt if split"):
        dataset(Reader(plain), pairs(), path=write("a.jsonl", [{"prompt": "XX", "completion": "YYYYYYY"}]), length=6, overlong="split")


def test_an_answer_cut_away_whole_is_an_error_unless_dropped(plain, write):
    path = write("a.jsonl", CUT)
    with pytest.raises(ValueError, match="row 0: What is learned begins at token 8 of 10, so truncation to length=6 cuts the answer away"):
        dataset(Reader(plain), pairs(), path=path, length=6)
    report = dataset(Reader(plain), pairs(), path=path, length=6, unlearned="drop").report
    assert (report.cut_away, report.dropped, report.truncated, report.rows) == (1, 1, 0, 1)
    assert "1 left out, 1 of these with the answer cut away whole" in str(report)


def test_a_row_with_nothing_learned_is_an_error_unless_dropped(chat, write):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write("a.jsonl", [{"messages": turns}, {"messages": turns[:1]}])
    with pytest.raises(ValueError, match=r"row 1: None of its .* tokens is learned"):
        dataset(Reader(chat), messages(), path=path, length=64)
    assert dataset(Reader(chat), messages(), path=path, length=64, unlearned="drop").report.dropped == 1


def test_a_data_set_with_nothing_learned_is_always_an_error(plain, write):
    with pytest.raises(ValueError, match="nothing is learned; all 1 examples were left out"):
        dataset(Reader(plain), pairs(), path=write("a.jsonl", CUT[:1]), length=6, unlearned="drop")


def test_a_wrong_row_is_named_by_its_number(plain, write):
    good = [{"prompt": "X", "completion": "Y"}] * 1203
    with pytest.raises(ValueError, match=r"a\.jsonl, row 1203: Column 'completion' is null"):
        dataset(Reader(plain), pairs(), path=write("a.jsonl", [*good, {"prompt": "X", "completion": None}]))


def test_a_row_that_the_tokenizer_refuses_is_named_by_its_number(t5, write):
    reader = Reader(t5, kind="encoder_decoder", start=0)
    with pytest.raises(ValueError, match=r"a\.jsonl, row 3: The tokenizer makes a control token of plain text: 'a</s>b'"):
        dataset(reader, pairs(), path=write("a.jsonl", [*PAIRS, {"prompt": "a", "completion": "a</s>b"}, *PAIRS]))


def test_options_name_what_exists(plain, write):
    path = write("a.jsonl", PAIRS)
    for option, message in (
        ({"overlong": "cut"}, "overlong='cut' is not one of truncate, split, drop, error"),
        ({"unlearned": "keep"}, "unlearned='keep' is not one of error, drop"),
        ({"length": 1}, "length=1 must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            dataset(Reader(plain), pairs(), path=path, **option)


def test_the_signature_is_a_schema():
    keys = parts.schema(dataset)
    assert isinstance(keys["path"], parts.Required)
    assert parts.kind(dataset, "columns") is tuple
    assert parts.kind(dataset, "subset") is str
    assert keys["length"] == 1024


def test_a_row_out_of_range_is_an_index_error(plain, write):
    rows = dataset(Reader(plain), pairs(), path=write("a.jsonl", PAIRS), length=10)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            rows[index]


def test_the_preview_marks_what_is_learned(plain, write):
    rows = dataset(Reader(plain), pairs(), path=write("a.jsonl", PAIRS), length=10)
    assert preview(rows, plain) == "row 0: 8 tokens, 5 of them learned «so», 2 padding\n--- example 1\nXY«Z</s>»\n--- example 2\nX«YZ</s>»"


@pytest.mark.skipif(not GSM8K.exists(), reason=f"the data folder is not here: {GSM8K}")
def test_real_questions_and_answers(started):
    format = pairs(prompt="Question: {question}\nAnswer:", completion=" {answer}")
    began = time.monotonic()
    rows = dataset(Reader(started), format, path=str(GSM8K), split="train[:200]", length=2048)
    assert time.monotonic() - began < 10
    assert rows.report.examples == 200
    assert rows.report.dropped == rows.report.truncated == 0
    assert len(rows) <= -(-rows.report.tokens // 2048) + 1
    assert 0.4 < rows.report.learned_share < 0.7
    first = preview(rows, started).split("\n--- example 2")[0]
    assert "<s>Question: Natalia sold clips" in first
    assert "Answer:« Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n" in first
    assert first.endswith("#### 72</s>»")
