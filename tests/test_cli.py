"""The command line: help without jax, every mistake one clear line before anything is compiled, and a dry run that shows all."""

import json
import subprocess
import sys
import time

import pytest

from tests import runs
from tuning.__main__ import VERBS, main
from tuning.methods import METHODS


@pytest.fixture
def config(home, tmp_path):
    return lambda **changes: f"--config={runs.write_config(tmp_path / 'config.py', runs.config(home, **changes))}"


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_is_complete_quick_and_needs_no_jax(verb):
    words = [verb, "--help"] if verb else ["--help"]
    program = (
        f"import sys\nfrom tuning.__main__ import main\ntry:\n    code = main({words!r})\nexcept SystemExit as e:\n    code = e.code\n"
        "assert not {'jax', 'flax', 'numpy', 'transformers'} & set(sys.modules), 'heavy import'\nsys.exit(code)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=runs.environment(), cwd=runs.ROOT)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 5  # a tenth of a second on an idle machine
    flags = {
        None: VERBS,
        "train": ["--config", "--workdir", "--dry_run", "data.train.format"],
        "plan": ["--topology", "--compile", "--save", "--prices", "--measured", "--json", "--search", "--methods", "v5e:16x16", "h100:8"],
        "evaluate": ["--model", "--adapter", "--checkpoint", "--split"],
        "generate": ["--prompt", "--temperature", "--top_k", "--top_p", "--max_new_tokens", "--checkpoint"],
        "export": ["--format", "--merge", "--out", "--adapter"],
        "combine": ["--base", "--adapters", "--weights", "--how", "--density", "--svd_rank", "--out"],
        "prompts": ["--prompt", "--file", "--propose", "--ask", "--config.data.eval.path"],
        "sweep": ["--sweep", "--seeds", "--dir", "--runner", "--workers", "--dry_run", "--retries", "--measure", "--config", "get_sweep()"],
        "work": ["DIR", "--worker", "--distributed", "--coordinator"],
        "compare": ["--by", "--metric", "--goal", "--at", "--against", "--format", "--out", "HPARAMS"],
        "reproduce": ["--workdir", "--dry_run", "Exit status"],
    }
    assert all(flag in done.stdout for flag in flags[verb])


def test_an_unknown_verb_gets_a_suggestion(capsys):
    assert main(["trian"]) == 2
    assert "Did you mean train?" in capsys.readouterr().err


MISTAKES = {
    "unknown key": (["--config.method.rnak=8"], r"Unknown config key method.rnak. Did you mean rank?"),
    "another tool's key": (["--config.method.lora_r=8"], r"Did you mean method.rank?"),
    "unknown section": (["--config.optimiser.learning_rate=1"], "Unknown config key optimiser.learning_rate. Did you mean optimizer"),
    "unknown part": (["--config.method.name=lorra"], f"method.name='lorra' is not one of {', '.join(METHODS)}. Did you mean lora?"),
    "wrong type": (["--config.train.steps=many"], "steps"),
    "mesh": (["--config.mesh.data=3"], "needs 24 devices; there are 8"),
    "sequence": (["--config.mesh.fsdp=2", "--config.mesh.context=4", "--config.data.train.length=30"], "be a multiple of mesh.context=4"),
    "missing file": (["--config.data.train.path=/nowhere/train.jsonl"], "/nowhere/train.jsonl"),
    "missing model": (["--config.model.path=/nowhere/model"], "/nowhere/model"),
    "rank 0": (["--config.method.rank=0"], "rank=0: a rank is at least 1"),
    "target": (["--config.method.targets=('qq',)"], "'qq' matches no site of this model. There are: attn/q"),
    "column": (["--config.data.train.format.name=pairs", "--config.data.train.format.prompt=question"], "no column 'question'"),
    "batch": (["--config.train.batch_size=4"], "train.batch_size / train.accumulate=4 must be a multiple of 8"),
    "accumulate": (["--config.train.accumulate=3"], "train.accumulate=3 must divide train.batch_size=8"),
    "too long": (["--config.data.train.length=4096"], "data.train.length=4096 is more than the 128 positions"),
    "dtype": (["--config.model.dtype=float8"], "float8"),
    "remat": (["--config.model.remat=some"], "model.remat='some' is not one of none, dots, full"),
    "attention": (["--config.model.attention=flash"], "model.attention='flash' is not one of auto, blockwise, splash"),
    "no such kernel": (["--config.model.attention=splash"], "model.attention='splash' cannot be had. splash: not for cpu devices"),
    "kernel's length": (["--config.model.attention=splash_interpreted"], "length=32 is no multiple of 128. Set it to auto"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_writes_nothing(mistake, config, tmp_path, capsys):
    flags, message = MISTAKES[mistake]
    assert main(["train", config(), f"--workdir={tmp_path / 'run'}", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") <= 2
    assert not (tmp_path / "run").exists()


def test_a_malformed_line_is_named_by_file_and_number(config, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl\n')
    assert main(["train", config(data__train__path=str(bad)), f"--workdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "bad.jsonl" in error and "2" in error


def test_a_model_directory_without_weights_is_refused(config, home, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "empty" / name).write_bytes((home / "model" / name).read_bytes())
    assert main(["train", config(model__path=str(tmp_path / "empty")), f"--workdir={tmp_path / 'run'}"]) == 2
    assert "safetensors" in capsys.readouterr().err


def test_a_section_starts_again_when_its_name_changes(config, tmp_path, capsys):
    assert main(["train", config(), "--config.method.name=partial", "--config.method.last_layers=1", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "method.name = 'partial'" in out and "method.last_layers = 1" in out and "method.rank" not in out


def test_a_dry_run_shows_everything_and_writes_nothing(config, tmp_path, capsys):
    assert main(["train", config(), "--config.optimizer.learning_rate=3e-4", "--config.data.eval.length=64", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "optimizer.learning_rate = 0.0003" in out and "data.train.format.name = 'auto'" in out and "data.eval.length = 64" in out
    assert "trainable params: 3,712 || all params: 38,432 || trainable%: 9.6586" in out
    assert "blocks/*/attn/q/kernel" in out and "frozen" in out and "tuned" in out and "fsdp" in out
    assert "batch: 8 x 32 tokens" in out and "«" in out and "»" in out
    assert "Dry run: nothing was compiled, loaded or written." in out
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"config.py"}  # Python may keep a compiled one


def test_the_four_verbs_in_a_row(config, home, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", config(), f"--workdir={run}", "--config.train.steps=4"]) == 0
    final = capsys.readouterr().out
    assert "eval/loss" in final
    assert main(["evaluate", f"--model={run}", "--checkpoint=last"]) == 0
    measured = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert f"eval/loss {measured['loss']:.6g}"[:16] in final
    assert main(["generate", f"--model={run}", "--prompt=the red cat :", "--max_new_tokens=4"]) == 0
    assert main(["export", f"--model={run}", "--format=hf"]) == 2
    assert "add --merge" in capsys.readouterr().err
    assert main(["export", f"--model={run}", "--format=hf", "--merge", f"--out={tmp_path / 'merged'}"]) == 0
    assert main(["export", f"--model={run}", "--format=peft"]) == 0
    for model in ([f"--model={tmp_path / 'merged'}"], [f"--model={home / 'model'}", f"--adapter={run}/exports/peft"]):
        capsys.readouterr()
        data = ["--config.data.train.length=32", f"--config.data.eval.path={home / 'eval.jsonl'}"]
        assert main(["evaluate", *model, *data]) == 0
        again = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert again["loss"] == pytest.approx(measured["loss"], rel=1e-5)
