"""Metrics on disk: lines that survive a kill, are cut at a resume, and compare equal when the run is the same."""

import contextlib
import glob
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tuning
from tests import runs
from tuning.training.writer import Log, Writer, comparable, cut, read


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
    writer = Writer(tmp_path, to=())
    writer.write(3, {"loss": jnp.float32(0.5), "rate": np.float64(1e-4), "count": 7})
    assert lines(tmp_path) == ['{"step": 3, "loss": 0.5, "rate": 0.0001, "count": 7.0}']
    writer.close()


def test_values_that_are_not_finite_are_null(tmp_path):
    writer = Writer(tmp_path, to=())
    writer.write(1, {"a": float("nan"), "b": -float("inf"), "c": jnp.array(jnp.nan)})
    assert json.loads(lines(tmp_path)[0], parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": None}
    writer.close()


def test_a_metric_that_is_no_number_or_is_called_step_is_refused_before_anything_is_written(tmp_path):
    writer = Writer(tmp_path, to=())
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
        writer = Writer(tmp_path, after=after, to=())
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
    writer = Writer(tmp_path, to=())
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
        writer = Writer(tmp_path / name, to=())
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


def test_the_config_is_a_session_of_the_hparams_tab_that_ends_when_the_run_does(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    config = {"method": {"name": "lora", "rank": 8, "targets": ["q", "v"], "scaled": True, "none": None}, "rate": float("inf")}
    with contextlib.suppress(KeyboardInterrupt), Writer(tmp_path / "stopped", config=config):
        raise KeyboardInterrupt
    with Writer(tmp_path / "done", config=config):
        pass
    found = {"stopped": [], "done": []}
    for run, values in found.items():
        (path,) = (tmp_path / run / "tensorboard").iterdir()
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            values += [v for v in Event.FromString(data[12 : 12 + length]).summary.value if v.tag.startswith("_hparams_")]
            data = data[16 + length :]
    read_session = lambda value: HParamsPluginData.FromString(value.metadata.plugin_data.content)  # noqa: E731
    names = {run: [v.tag.removeprefix("_hparams_/") for v in values] for run, values in found.items()}
    assert names == {"stopped": ["session_start_info"], "done": ["session_start_info", "session_end_info"]}
    shown = read_session(found["stopped"][0]).session_start_info.hparams
    assert set(shown) == {"method.name", "method.rank", "method.targets", "method.scaled", "rate"}
    assert shown["method.name"].string_value == "lora" and shown["method.rank"].number_value == 8
    assert shown["method.targets"].string_value == "['q', 'v']" and shown["method.scaled"].bool_value is True
    assert shown["rate"].string_value == "inf"  # JSON, by which the tab asks, has no infinity
    assert read_session(found["done"][1]).session_end_info.status == 1  # STATUS_SUCCESS


def test_tensorboard_is_not_imported_unless_it_is_used():
    code = "import sys, tuning.training.writer; sys.exit('tensorboardX' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    "to, message", [(("tensorbord",), "'tensorbord', which is not one of"), (("wandb",), r"pip install 'tuning\[wandb\]'")]
)
def test_a_sink_that_is_unknown_or_not_installed_is_refused_before_anything_is_built(monkeypatch, to, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        Log(to=to)
    Log(to=("tensorboard",)), Log(to=())


def test_a_run_that_could_not_report_does_not_start(home, tmp_path):
    with pytest.raises(ValueError, match=r"log\.to has 'paper', which is not one of tensorboard, wandb, mlflow"):
        tuning.train(runs.config(home, log__to=("tensorboard", "paper")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Recorded:
    """Stands for wandb's or MLflow's module: what was called, in order."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"), experiment_id="e1", id=kwargs.get("id") or "w1", args=args)

        return call


@pytest.fixture
def wandb(monkeypatch):
    module, run = Recorded(), Recorded()
    run.id = "w1"
    module.init = lambda **given: module.calls.append(("init", (), given)) or run
    module.Html = lambda text: text
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module, run


def test_weights_and_biases_get_the_same_numbers_and_find_a_resumed_run_again(tmp_path, wandb):
    module, run = wandb
    with Writer(tmp_path / "a", after=-1, to=("wandb",), config={"seed": 3}) as writer:
        writer.write(1, {"loss": 0.5})
        writer.text(1, "sample", "<b>")
    with contextlib.suppress(KeyboardInterrupt), Writer(tmp_path / "a", after=1, to=("wandb",)):
        raise KeyboardInterrupt
    Writer(tmp_path / "a", after=-1, to=("wandb",)).close()
    assert [(given["id"], given["resume"], given["name"]) for _, _, given in module.calls] == [
        (None, None, "a"), ("w1", "allow", "a"), (None, None, "a"),
    ]  # fmt: skip
    assert module.calls[0][2]["config"] == {"seed": 3}
    assert run.calls == [
        ("log", ({"loss": 0.5},), {"step": 1}), ("log", ({"sample": "<pre>&lt;b&gt;</pre>"},), {"step": 1}),
        ("finish", (), {"exit_code": 0}), ("finish", (), {"exit_code": 1}), ("finish", (), {"exit_code": 1}),
    ]  # fmt: skip
    assert not (tmp_path / "a" / "tensorboard").exists()


def test_mlflow_gets_the_same_numbers_and_the_settings_once(tmp_path, monkeypatch):
    client = Recorded()
    entities = SimpleNamespace(Param=lambda *args: args, Metric=lambda name, value, time, step: (name, value, step))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda: client, entities=entities))
    with Writer(
        tmp_path / "a", after=-1, to=("mlflow",), config={"method": {"rank": 8}, "many": {str(i): i for i in range(150)}}
    ) as writer:
        writer.write(1, {"loss": float("nan"), "rate": 2})
    Writer(tmp_path / "a", after=1, to=("mlflow",), config={"method": {"rank": 8}}).close()
    batches = [given for name, _, given in client.calls if name == "log_batch"]
    assert [len(given.get("params", ())) for given in batches] == [100, 51, 0]
    assert batches[0]["params"][0] == ("method.rank", "8")
    assert repr(batches[2]["metrics"]) == "[('loss', nan, 1), ('rate', 2.0, 1)]"
    ends = [args for name, args, _ in client.calls if name == "set_terminated"]
    assert ends == [("r1", "FINISHED"), ("r1", "KILLED")]
    assert sum(name == "create_run" for name, _, _ in client.calls) == 1
