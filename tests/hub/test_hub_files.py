"""Safetensors files: what is read from them, what is refused, and how they are written."""

import io
import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tuning.hub import files

RNG = np.random.default_rng(0)


def values():
    return {
        "model.a": RNG.normal(size=(5, 7)).astype(np.float32),
        "model.b": RNG.normal(size=(3, 4, 2)).astype(ml_dtypes.bfloat16),
        "model.c": RNG.integers(0, 9, 3),
        "model.d": RNG.normal(size=(6,)).astype(np.float16),
        "model.empty": np.zeros((0, 4), np.float32),
        "model.scalar": np.float32(2.5).reshape(()),
    }


def equal(one, two):
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()


@pytest.mark.parametrize("shard_bytes", [10**6, 150, 1])
def test_what_is_written_is_read_and_the_safetensors_library_agrees(shard_bytes, tmp_path):
    from safetensors.numpy import load_file

    held = values()
    written = files.write(tmp_path, iter(held.items()), shard_bytes)
    tensors = files.Tensors(tmp_path)
    assert set(tensors) == set(held) and all(equal(tensors.read(name), held[name]) for name in held)
    theirs = {name: array for file in written for name, array in load_file(file).items()}
    assert set(theirs) == set(held) and all(equal(theirs[name], held[name]) for name in held if name != "model.b")
    assert np.array_equal(theirs["model.b"].view(np.uint16), held["model.b"].view(np.uint16))
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (shard_bytes < 10**6)
    assert not list(tmp_path.glob(".*"))


def test_a_slice_is_read_in_the_files_dtype(tmp_path):
    held = values()
    files.write(tmp_path, held.items())
    part = files.Tensors(tmp_path).read("model.b", (slice(1, 3), slice(None), slice(0, 1)))
    assert equal(part, held["model.b"][1:3, :, :1].copy())


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path):
    def tensors():
        yield "a", np.zeros(100, np.float32)
        yield "b", np.zeros(100, np.float32)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        files.write(tmp_path, tensors(), 100)
    with pytest.raises(ValueError, match="complex128"):
        files.write(tmp_path, [("a", np.zeros(3, complex))])
    assert not list(tmp_path.iterdir())


def test_weights_are_not_overwritten(tmp_path):
    files.write(tmp_path, values().items())
    with pytest.raises(ValueError, match=r"already has weights \(model.safetensors\)"):
        files.write(tmp_path, values().items())


def raw(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def one(**changes) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}).encode()


def zipped() -> bytes:
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 2.0}))
    return stream.getvalue()


TWO = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
HOSTILE = {
    "empty file": b"",
    "header beyond the file": raw(one(), b"0" * 8, length=10**6),
    "huge header": raw(one(), b"0" * 8, length=2**63),
    "truncated values": raw(one(), b"0" * 7),
    "values left over": raw(one(), b"0" * 9),
    "not JSON": raw(b"{nonsense", b"0" * 8),
    "not an object": raw(b"[1, 2]", b"0" * 8),
    "not UTF-8": raw(b'{"\xff\xfe": 1}', b"0" * 8),
    "deeply nested": raw(b"[" * 100_000, b"0" * 8),
    "entry is no object": raw(b'{"a": 3}', b"0" * 8),
    "missing offsets": raw(b'{"a": {"dtype": "F32", "shape": [2]}}', b"0" * 8),
    "twice the same name": raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, ' + one()[1:], b"0" * 8),
    "unknown dtype": raw(one(dtype="F99"), b"0" * 8),
    "negative shape": raw(one(shape=[-2]), b"0" * 8),
    "fractional shape": raw(one(shape=[2.0]), b"0" * 8),
    "overflowing shape": raw(one(shape=[2**62, 2**62]), b"0" * 8),
    "shape and bytes differ": raw(one(shape=[3]), b"0" * 8),
    "offsets reversed": raw(one(data_offsets=[8, 0]), b"0" * 8),
    "offsets beyond the file": raw(one(data_offsets=[800, 808]), b"0" * 8),
    "a gap between tensors": raw(json.dumps(TWO | {"b": {**TWO["b"], "data_offsets": [12, 20]}}).encode(), b"0" * 20),
    "negative offsets": raw(one(data_offsets=[-8, 0]), b"0" * 8),
    "three offsets": raw(one(data_offsets=[0, 4, 8]), b"0" * 8),
    "shape that no array can have": raw(one(shape=[2**62, 2**62, 0], data_offsets=[0, 0])),
    "shape is text": raw(one(shape="2"), b"0" * 8),
    "dtype is a list": raw(one(dtype=["F32"]), b"0" * 8),
    "a zip file": zipped(),
    "a pickle": pickle.dumps({"a": np.zeros(2)}),
    "a pickle as text": pickle.dumps({"a": 2.0}, protocol=0),
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 8\n",
    "a web page": b"<!DOCTYPE html><html></html>",
    "overlapping tensors": raw(json.dumps(TWO).encode(), b"0" * 12),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_or_hostile_file_is_an_error_that_names_it(kind, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[kind])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or damaged"):
        files.Tensors(tmp_path)


def test_a_header_that_is_too_long_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", 10**8 + 1))
        stream.truncate(2 * 10**8)
    with pytest.raises(ValueError, match=r"its header would be 100000001 bytes long"):
        files.Tensors(tmp_path)


def test_a_tensor_that_begins_at_an_odd_byte_is_read(tmp_path):
    header = one().ljust(81)
    (tmp_path / "model.safetensors").write_bytes(raw(header, np.float32([1, 2]).tobytes()))
    assert files.Tensors(tmp_path).entries["a"].start % 4 == 1
    assert files.Tensors(tmp_path).read("a").tolist() == [1, 2]


def test_a_tensor_that_stands_in_two_files_is_refused(tmp_path):
    files.write(tmp_path, [("a", np.zeros(2, np.float32)), ("b", np.zeros(2, np.float32))], 1)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(raw(one(), b"0" * 8))
    with pytest.raises(ValueError, match="Tensor a stands in two files"):
        files.Tensors(tmp_path)


def with_index(directory, weight_map):
    files.write(directory, [("a", np.zeros(2, np.float32)), ("b", np.zeros(2, np.float32))], 1)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize(
    "name", ["/etc/model.safetensors", "../secret.safetensors", "sub/x.safetensors", "C:x.safetensors", "..", "", "a\\b.safetensors"]
)
def test_an_index_that_points_out_of_the_folder_is_refused(name, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(raw(one(), b"0" * 8))
    with pytest.raises(ValueError, match=r"must be .safetensors files of the folder itself"):
        files.Tensors(with_index(tmp_path / "model", {"a": name}))


def test_a_link_out_of_the_folder_is_refused_but_the_hubs_cache_is_read(tmp_path):
    (tmp_path / "outside").mkdir()
    target = files.write(tmp_path / "outside", values().items())[0]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(target)
    with pytest.raises(ValueError, match="outside of its folder"):
        files.Tensors(tmp_path / "linked")
    sharded = with_index(tmp_path / "sharded", {"a": "model-00001-of-00002.safetensors", "model.a": "model-00003.safetensors"})
    (sharded / "model-00003.safetensors").symlink_to(target)
    with pytest.raises(ValueError, match="outside of its folder"):
        files.Tensors(sharded)
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir()
    target.replace(blobs / "cafe")
    (snapshot / "model.safetensors").symlink_to("../../blobs/cafe")
    assert "model.a" in files.Tensors(snapshot)


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "model-00009-of-00009.safetensors"}, "model-00009-of-00009.safetensors is missing"),
        ({"a": "model-00002-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}, "tensor a is in model-00002.*it is not"),
        ({"z": "model-00001-of-00002.safetensors"}, "tensor z"),
        (["a"], "no weight_map"),
        ({"a": 3}, "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(weight_map, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        files.Tensors(with_index(tmp_path, weight_map))


def test_pickles_are_refused_and_never_opened(tmp_path):
    planted = tmp_path / "planted"

    class Bomb:
        def __reduce__(self):
            return open, (str(planted), "w")

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"only as pickles \(pytorch_model.bin\).*save_pretrained"):
        files.Tensors(tmp_path)
    assert not planted.exists()


def test_a_folder_without_weights_says_so(tmp_path):
    (tmp_path / "training_args.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no weights: neither model.safetensors nor"):
        files.Tensors(tmp_path)


def test_resolve_takes_a_folder_and_says_what_it_looked_for(tmp_path, monkeypatch):
    assert files.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a file"):
        files.resolve(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"no such folder.*does not look like a hub id"):
        files.resolve("./not/here/at/all")
    with pytest.raises(ValueError, match=r"'nobody/no-such-model'.*no such folder.*hub did not give.*revision 'v1'"):
        files.resolve("nobody/no-such-model", "v1")


FETCHED = """config.json generation_config.json model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json README.md
    adapter_config.json adapter_model.safetensors tokenizer.json tokenizer_config.json chat_template.jinja tokenizer.model spiece.model
    sentencepiece.bpe.model vocab.txt vocab.json merges.txt special_tokens_map.json modules.json sentence_bert_config.json
    config_sentence_transformers.json 1_Pooling/config.json 2_Dense/config.json 2_Dense/model.safetensors"""
LEFT = """pytorch_model.bin tf_model.h5 flax_model.msgpack modeling_custom.py model.gguf consolidated.safetensors consolidated.00.pth
    training_args.bin onnx/config.json onnx/model.onnx openvino/config.json original/params.json original/consolidated.00.pth
    fp16/model.safetensors 4bit/model.safetensors 8-bit/config.json 10B/model.safetensors checkpoint-500/model.safetensors
    2_Dense/pytorch_model.bin 0_Transformer/model.safetensors 1_Pooling/onnx/config.json .cache/config.json"""


def test_an_id_is_fetched_from_the_hub_with_all_that_is_read_and_no_other_weights(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def fetch(name, **given):
        asked.update(name=name, **given)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert files.resolve("owner/name", "v1") == tmp_path
    patterns = {key: asked.pop(key) for key in ("allow_patterns", "ignore_patterns")}
    assert asked == {"name": "owner/name", "revision": "v1"}
    assert sorted(filter_repo_objects([*FETCHED.split(), *LEFT.split()], **patterns)) == sorted(FETCHED.split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff{}", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, not a list"),
        (b"null", "must hold a JSON object, not a NoneType"),
    ],
)
def test_json_that_is_no_object_is_an_error_that_names_its_file(text, said, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"config.json {said}"):
        files.read_json(tmp_path / "config.json")


def test_huge_json_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(10**9)  # a hole, which takes no room
    with pytest.raises(ValueError, match=r"config.json has 1,000,000,000 bytes"):
        files.read_json(tmp_path / "config.json")
