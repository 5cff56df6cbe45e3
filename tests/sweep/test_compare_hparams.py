"""TensorBoard's HPARAMS tab over a directory of runs, as its own server answers."""

import json
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.sweep import fake_runs
from tests.sweep.fake_runs import IA3, LORA
from tuning.training.writer import Writer


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Asks the HPARAMS plugin of a TensorBoard over three finished runs and one that was stopped."""
    pytest.importorskip("tensorboard")
    root = tmp_path_factory.mktemp("hparams")
    for name, base, changes, loss in (("lora", LORA, {}, 1.0), ("wide", LORA, {"method__rank": 16}, 0.5), ("ia3", IA3, {}, 2.0)):
        with Writer(root / name, config=fake_runs.config(base, 0, **changes)) as writer:
            writer.write(0, {"eval/loss": 3.0})
            writer.write(20, {"eval/loss": loss})
    Writer(root / "stopped", config=fake_runs.config(LORA, 1)).close()
    with Writer(root / "stopped", after=0, config=fake_runs.config(LORA, 1)) as writer:
        writer.write(10, {"eval/loss": 2.5})
        writer.close()
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={root}", "--port=0", "--host=127.0.0.1", "--load_fast=false"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    line = next(line for line in server.stderr if "http://" in line)
    address = next(word for word in line.split() if word.startswith("http://")).rstrip("/")

    def ask(what, **given):
        request = urllib.request.Request(
            f"{address}/data/plugin/hparams/{what}", json.dumps(given).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)

    deadline = time.monotonic() + 60
    while len(ask("experiment").get("metricInfos", ())) < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    yield ask
    server.terminate()
    server.wait(timeout=30)


def test_the_keys_that_differ_come_first(ask):
    infos = ask("experiment")["hparamInfos"]
    assert [info["name"] for info in infos[:4]] == ["method.name", "method.rank", "method.targets", "seed"]
    assert [info["differs"] for info in infos] == [True] * 4 + [False] * (len(infos) - 4)
    kinds = {info["name"]: info["type"] for info in infos}
    assert (kinds["method.name"], kinds["method.rank"]) == ("DATA_TYPE_STRING", "DATA_TYPE_FLOAT64")
    assert {"optimizer.learning_rate", "train.steps", "eval.every"} <= set(kinds)


def test_each_run_has_its_settings_its_last_metrics_and_whether_it_ended(ask):
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    groups = ask("session_groups", startIndex=0, sliceSize=10, allowedStatuses=statuses, colParams=[])["sessionGroups"]
    found = {group["name"].split("/")[0]: group for group in groups}
    assert set(found) == {"lora", "wide", "ia3", "stopped"}
    values = {name: {value["name"]["tag"]: value["value"] for value in group["metricValues"]} for name, group in found.items()}
    assert values == {"lora": {"eval/loss": 1.0}, "wide": {"eval/loss": 0.5}, "ia3": {"eval/loss": 2.0}, "stopped": {"eval/loss": 2.5}}
    assert found["wide"]["hparams"]["method.rank"] == 16 and "method.rank" not in found["ia3"]["hparams"]
    ended = {name: group["sessions"][0].get("status") for name, group in found.items()}
    assert ended == {"lora": "STATUS_SUCCESS", "wide": "STATUS_SUCCESS", "ia3": "STATUS_SUCCESS", "stopped": "STATUS_UNKNOWN"}
