"""Metrics on disk: lines that survive a kill, are cut at a resume, and compare equal when the run is the same."""

import glob
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tuning.training.writer import Writer, comparable, cut, read


@pytest.fixture
def events(tmp_path):
    """Reads the TensorBoard events of a run: [(step, tag, value)]; value None is a text, tag None a purge."""

    def load():
        from tensorboardX.event_file_writer import EventsWriter  # noqa: F401
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter  # noqa: F401

        found = []
        for path in sorted(glob.glob(str(tmp_path / "tensorboard" / "*"))):
            data = open(path, "rb").read()  # noqa: SIM115
            while data:
                length = int.from_bytes(data[:8], "little")
                event = Event.FromString(data[12 : 12 + length])
                data = data[16 + length :]
                if event.HasField("session_log"):
                    found.append((event.step, None, None))
                found += [(event.step, v.tag, v.simple_value if v.HasField("simple_value") else None) for v in event.summary.value]
        return found

    return load


def lines(path):
    return (path / "metrics.jsonl").read_text().splitlines()


def test_a_line_is_a_step_and_plain_floats_and_is_on_disk_at_once(tmp_path):
    writer = Writer(tmp_path, tensorboard=False)
    writer.write(3, {"loss": jnp.float32(0.5), "rate": np.float64(1e-4), "count": 7})
    assert lines(tmp_path) == ['{"step": 3, "loss": 0.5, "rate": 0.0001, "count": 7.0}']
    writer.close()


def test_values_that_are_not_finite_are_null(tmp_path):
    writer = Writer(tmp_path, tensorboard=False)
    writer.write(1, {"a": float("nan"), "b": -float("inf"), "c": jnp.array(jnp.nan)})
    assert json.loads(lines(tmp_path)[0], parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": None}
    writer.close()


def test_a_metric_that_is_no_number_or_is_called_step_is_refused_before_anything_is_written(tmp_path):
    writer = Writer(tmp_path, tensorboard=False)
    for metrics, message in [
        ({"a": 1, "name": "x"}, "name='x' is not a number"),
        ({"step": 1}, "'step'"),
        ({"a": jnp.ones(2)}, "not a number"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.write(1, metrics)
    assert lines(tmp_path) == []
    writer.close()


def test_the_same_numbers_and_the_texts_become_events(tmp_path, events):
    writer = Writer(tmp_path)
    writer.write(1, {"loss": 0.5})
    writer.write(2, {"loss": 0.25, "eval/loss": 1.0})
    writer.text(2, "sample", "é\nça va")
    writer.close()
    assert [e for e in events() if e[2] is not None] == [(1, "loss", 0.5), (2, "loss", 0.25), (2, "eval/loss", 1.0)]
    assert any(step == 2 and "sample" in tag for step, tag, value in events() if value is None)
    assert json.loads((tmp_path / "texts.jsonl").read_text()) == {"step": 2, "name": "sample", "text": "é\nça va"}


def test_a_resumed_run_loses_what_was_written_after_its_step(tmp_path, events):
    first = Writer(tmp_path)
    for step in range(1, 6):
        first.write(step, {"loss": step})
        first.text(step, "sample", str(step))
    first.close()
    second = Writer(tmp_path, after=3)
    second.write(4, {"loss": 40})
    second.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": s, "loss": v} for s, v in [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]]
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 3
    assert (4, None, None) in events()  # TensorBoard hides events of this step and later ones that came before


def test_a_run_that_starts_over_keeps_nothing_and_a_reopened_one_everything(tmp_path):
    for after, expected in [(None, [0]), (None, [0, 0]), (0, [0, 0, 0]), (-1, [0])]:
        writer = Writer(tmp_path, after=after, tensorboard=False)
        writer.write(0, {"loss": 1})
        writer.close()
        assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == expected


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "{", "\xff\xfe", '{"step": 3, "loss": 3.0}'])
def test_a_line_that_a_kill_left_unfinished_is_removed(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n' + rest.encode("latin-1"))
    cut(tmp_path, 5)
    assert [line["step"] for line in read(path)] == [1, 2]
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n' + rest.encode("latin-1"))
    writer = Writer(tmp_path, tensorboard=False)
    writer.write(2, {"loss": 2})
    writer.close()
    assert [line["step"] for line in read(path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not a line of metrics: '{\"st'"):
        cut(tmp_path, 1)
    assert len(lines(tmp_path)) == 3


def test_a_cut_without_files_does_nothing(tmp_path):
    cut(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_compare_equal_up_to_time_and_memory(tmp_path):
    for name, seconds in [("a", 1.0), ("b", 2.0)]:
        writer = Writer(tmp_path / name, tensorboard=False)
        writer.write(1, {"loss": 0.5, "time/step": seconds, "memory/peak": seconds, "timely": 3})
        writer.close()
    a, b = (tmp_path / name / "metrics.jsonl" for name in "ab")
    assert read(a) != read(b)
    assert comparable(a) == comparable(b) == [{"step": 1, "loss": 0.5, "timely": 3.0}]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = Writer(tmp_path / "run", after=-1)
    writer.write(1, {"loss": 1})
    writer.text(1, "sample", "x")
    writer.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_not_imported_unless_it_is_used():
    code = "import sys, tuning.training.writer; sys.exit('tensorboardX' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
