"""Provenance: what is collected, and that no secret is in it."""

import base64
import json
import shutil
import subprocess
import urllib.parse

import jax
import pytest

from tuning.training import provenance
from tuning.training.provenance import collect, is_secret, redact


def test_it_says_where_a_run_comes_from_in_values_that_json_takes():
    facts = collect(["tuning", "train", "--config.train.steps=3"], {"train": "sha256:ab"})
    assert json.loads(json.dumps(facts)) == facts
    assert facts["command"] == ["tuning", "train", "--config.train.steps=3"] and facts["data"] == {"train": "sha256:ab"}
    assert facts["packages"]["jax"] == jax.__version__ and "optax" in facts["packages"]
    assert facts["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert facts["time"].endswith("+00:00") and facts["python"].startswith("3.")


def test_the_commit_is_that_of_the_checkout_that_tracks_the_code(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "code.py"
    file.write_text("x = 1\n")
    assert provenance._git(file) is None  # no checkout
    git("init")
    assert provenance._git(file) is None  # a checkout, but the code is not in it
    git("add", "code.py")
    assert provenance._git(file) is None  # no commit yet
    git("commit", "-m", "first")
    assert provenance._git(file) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    file.write_text("x = 2\n")
    assert provenance._git(file) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance._git(file) is None  # no git


@pytest.mark.parametrize(
    "key",
    ["--token", "--config.hub.token", "HF_TOKEN", "hf_token", "--api-key", "--config.tracker.api_key", "WANDB_API_KEY", "--password",
     "DB_PASSWD", "AWS_SECRET_ACCESS_KEY", "client_secret", "--auth-token", "--credentials", "apikey"],
)  # fmt: skip
def test_these_keys_name_a_secret(key):
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    ["--num_tokens", "--config.data.max_tokens", "--tokenizer", "--config.model.tokenizer.path", "eos_token", "--config.data.pad_token",
     "max_new_token", "tokens_per_step", "--key", "--config.seed.key", "monkey", "secretary", "--config.token_count"],
)  # fmt: skip
def test_these_keys_do_not(key):
    assert not is_secret(key)


def test_a_command_line_keeps_its_keys_and_loses_its_secrets():
    argv = [
        "train",
        "--config.hub.token=s3cr3t",
        "--api-key",
        "s3cr3t",
        "--num_tokens=5",
        "--token",
        "--steps=3",
        "--password=",
        "--eos_token",
        "</s>",
    ]
    assert redact(argv) == [
        "train",
        "--config.hub.token=***",
        "--api-key",
        "***",
        "--num_tokens=5",
        "--token",
        "--steps=3",
        "--password=",
        "--eos_token",
        "</s>",
    ]


def test_secrets_are_recognised_by_their_form():
    argv = ["--path=https://me:pa55@example.org/x", "--note=hf_" + "a1B2" * 8, "https://example.org:8080/x"]
    assert redact(argv) == ["--path=https://***@example.org/x", "--note=***", "https://example.org:8080/x"]


@pytest.mark.parametrize("variable", ["HF_TOKEN", "WANDB_API_KEY", "SOME_PASSWORD"])
def test_the_value_of_a_secret_environment_variable_appears_nowhere_in_any_form(variable, monkeypatch):
    value = "plänted/secret+value"
    monkeypatch.setenv(variable, value)
    forms = [value, urllib.parse.quote(value, safe=""), base64.b64encode(value.encode()).decode()]
    text = json.dumps(collect(["train", f"--note=x{value}y", *forms], {}), ensure_ascii=False)
    assert not any(form in text for form in forms) and "x***y" in text
