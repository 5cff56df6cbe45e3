"""Reading files, folders and saved sets; and everything that can be wrong with them."""

import gzip
import hashlib

import datasets
import pytest

from tuning.data import sources

ABC = [{"text": "a"}, {"text": "b"}, {"text": "c"}]


def texts(path, **options):
    return list(sources.read(path, **options)["text"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ABC),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "b"}\n\n{"text": "c"}', mtime=0)),
        ("a.json", '[{"text": "a"},\n {"text": "b"}, {"text": "c"}]'),
        ("b.json", ABC),
        ("a.csv", 'n,text\n1,a\n2,"b"\n3,c\n'),
        ("a.tsv", "text\tn\na\t1\nb\t2\nc\t3\n"),
        ("a.txt", "a\n\nb\n  \nc\n"),
    ],
)
def test_every_kind_of_file_gives_its_rows(write, name, content):
    assert texts(write(name, content)) == ["a", "b", "c"]


def test_parquet_is_read(tmp_path):
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_list(ABC).to_parquet(path)
    assert texts(path) == ["a", "b", "c"]


def test_globs_lists_and_folders_are_read_in_the_order_of_names(write, tmp_path):
    one, two = write("d/1.jsonl", ABC[:1]), write("d/2.jsonl", ABC[1:])
    assert texts(str(tmp_path / "d/*.jsonl")) == texts(str(tmp_path / "d")) == ["a", "b", "c"]
    assert texts([two, one]) == ["b", "c", "a"]


def test_the_names_in_a_folder_tell_its_splits(write, tmp_path):
    write("d/train.jsonl", ABC[:2])
    write("d/dev.jsonl", ABC[2:])
    assert texts(str(tmp_path / "d")) == ["a", "b"]
    assert texts(str(tmp_path / "d"), split="validation") == ["c"]
    assert texts(str(tmp_path / "d"), split="train[1:]+validation") == ["b", "c"]
    with pytest.raises(ValueError, match=r"split='test' names \['test'\]; there is validation, train"):
        sources.read(str(tmp_path / "d"), split="test")


def test_a_folder_with_files_of_no_split_beside_a_split_is_refused(write, tmp_path):
    write("d/train.jsonl", ABC)
    write("d/solutions.jsonl", ABC)
    with pytest.raises(ValueError, match=r"also solutions.jsonl"):
        sources.read(str(tmp_path / "d"))


def test_a_saved_data_set_is_read_and_sliced(tmp_path):
    data = datasets.Dataset.from_list(ABC)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(tmp_path / "two")
    assert texts(str(tmp_path / "one"), split="train[1:]") == ["b", "c"]
    assert texts(str(tmp_path / "two"), split="test+train[:1]") == ["c", "a"]
    with pytest.raises(ValueError, match="Unknown split"):
        sources.read(str(tmp_path / "two"), split="dev")


def test_a_split_slices(write):
    path = write("a.jsonl", [{"text": str(i)} for i in range(20)])
    assert texts(path, split="train[:95%]") == [str(i) for i in range(19)]
    assert texts(path, split="train[95%:]") == ["19"]


def test_tables_without_a_header_take_names_and_their_quotes_and_numbers_stay(write):
    data = sources.read(write("a.tsv", 'he said "so\t007\nNA\t1.50\n'), columns=("sentence", "label"))
    assert data[:] == {"sentence": ['he said "so', "NA"], "label": ["007", "1.50"]}


def test_an_empty_cell_is_null(write):
    assert sources.read(write("a.csv", "a,b\n,x\n"))[0] == {"a": None, "b": "x"}


def test_text_is_sampled_by_line_paragraph_or_document(write):
    path = write("a.txt", "a\nb\n\nc\n")
    assert texts(path, sample_by="paragraph") == ["a\nb", "c\n"]
    assert texts(path, sample_by="document") == ["a\nb\n\nc\n"]
    with pytest.raises(ValueError, match="sample_by='word' is not one of line, paragraph, document"):
        sources.read(path, sample_by="word")


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), r"a\.jsonl\.gz is empty"),
        ("a.jsonl", GOOD + b'{"text": "b"\n', r"a\.jsonl, line 2: not JSON .*: '\{\"text\": \"b\"'"),
        ("a.jsonl", GOOD + b"\n" + b'{"text": "b', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", GOOD + b"[1, 2]\n", r"a\.jsonl, line 2: not an object"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"]', r"a\.json, line 2: not JSON"),
        ("a.json", GOOD + b"{\n", r"a\.json, line 2: not JSON"),
        ("a.txt", b"a\nb\xe9\n", r"a\.txt, line 2: not UTF-8"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv, line 3: 3 fields, but 2 columns"),
        ("a.csv", b"a,b\n1,2\n1\n", r"a\.csv, line 3: 1 fields"),
        ("a.tsv", b"a\ta\n1\t2\n", r"names a column twice. Without a header line, set columns"),
        ("a.csv", b"a,b\n", r"a\.csv, split 'train',"),
        ("a.txt", b"\n \n", r"holds no rows"),
        ("a.jsonl.gz", gzip.compress(GOOD * 1000, mtime=0)[:-20], r"a\.jsonl\.gz is damaged or cut short"),
        ("a.jsonl.gz", GOOD, r"a\.jsonl\.gz is damaged"),
        ("a.parquet", b"PAR1", r"a\.parquet, split 'train', could not be read"),
        ("a.docx", b"x", r"a\.docx has no known suffix"),
    ],
)
def test_a_broken_file_is_named_with_the_line(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        sources.read(write(name, content))


def test_an_empty_shard_is_an_error(write):
    with pytest.raises(ValueError, match=r"2\.jsonl is empty"):
        sources.read([write("1.jsonl", ABC), write("2.jsonl", "")])


def test_a_missing_file_is_named_with_its_nearest_folder(write, tmp_path):
    write("d/there.jsonl", ABC)
    with pytest.raises(ValueError, match=rf"no {tmp_path}/d/x/y\.jsonl\. .* {tmp_path}/d, with: there\.jsonl"):
        sources.read(str(tmp_path / "d/x/y.jsonl"))
    with pytest.raises(ValueError, match="No file matches"):
        sources.read(str(tmp_path / "d/*.csv"))
    with pytest.raises(ValueError, match="Files of several kinds"):
        sources.read([write("a.csv", "a\n1\n"), write("a.jsonl", ABC)])


def test_what_is_neither_here_nor_on_the_hub_says_both():
    with pytest.raises(ValueError, match="nobody/nothing is not on this disk, and as a hub data set it could not be read"):
        sources.read("nobody/nothing")


def test_options_that_do_not_apply_are_refused(write):
    path = write("a.jsonl", ABC)
    with pytest.raises(ValueError, match="subset='x' names a configuration of a hub data set"):
        sources.read(path, subset="x")
    with pytest.raises(ValueError, match=r"columns=.*Leave it out"):
        sources.read(path, columns=("a",))
    with pytest.raises(ValueError, match="no data"):
        sources.read(path, split="train[:0]")


def test_the_digest_is_of_the_contents_and_not_of_the_names(write):
    one, same, other = write("1.jsonl", ABC), write("2.jsonl", ABC), write("3.jsonl", ABC[1:])
    digest = lambda path: sources.digest(path, sources.read(path))  # noqa: E731
    with open(one, "rb") as file:
        assert digest(one) == digest(same) == hashlib.file_digest(file, "sha256").hexdigest()
    assert digest([one, other]) == digest([same, other]) != digest([other, one])
    assert digest(one) != digest(other)


def test_a_rewritten_file_is_read_anew(write):
    path = write("a.jsonl", ABC)
    assert texts(path) == ["a", "b", "c"]
    assert texts(write("a.jsonl", [{"text": "x"}, {"text": "y"}, {"text": "z"}])) == ["x", "y", "z"]
