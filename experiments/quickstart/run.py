"""The first run, whole: tokenizer, base model, full and LoRA tuning, comparison, samples, exports. See README.md beside this file."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rich.table import Table  # noqa: E402

import tuning  # noqa: E402
from experiments.quickstart import corpus  # noqa: E402
from tuning.api import evaluate  # noqa: E402
from tuning.training.progress import console  # noqa: E402

HOME = Path("runs/quickstart")
VOCABULARY = 2048
MARGIN = 0.3  # nats per token by which a tuned model must beat the base on held-out answers
PROMPTS = ("def is_directory(self)\n", "def read(self, size=-1)\n", "def _convert(value, encoding='utf-8')\n")


def config(name: str):
    """configs/quickstart.py:NAME."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs" / "quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(name)


def main() -> int:
    began = time.monotonic()
    shutil.rmtree(HOME, ignore_errors=True)  # it takes minutes, and always starts from nothing
    counts = corpus.write(HOME / "data")
    corpus.train_tokenizer(HOME / "data", HOME / "tokenizer", VOCABULARY)
    console.rule(f"1/3  a base model, from {counts['text']:,} texts that came with Python")
    seconds = {"base": timed(lambda: tuning.train(config("base"), HOME / "base"))}
    tuning.load(HOME / "base").export(HOME / "base" / "exports" / "hf")
    for number, name in ((2, "full"), (3, "lora")):
        console.rule(f"{number}/3  tuned: {name}, on {counts['train']:,} pairs (signature -> first line of the docstring)")
        seconds[name] = timed(lambda name=name: tuning.train(config(name), HOME / name))
    models = {name: tuning.load(HOME / name) for name in ("base", "full", "lora")}
    tuned_config = config("full").to_dict()
    scores = {name: evaluate(model, tuned_config) for name, model in models.items()}
    show(scores, models, seconds, counts)
    models["full"].export(HOME / "full" / "exports" / "hf")
    models["lora"].export(HOME / "lora" / "exports" / "peft", format="peft")
    (HOME / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    say_what_next()
    gains = {name: scores["base"]["loss"] - scores[name]["loss"] for name in ("full", "lora")}
    held = all(gain >= MARGIN for gain in gains.values())
    console.print(
        f"held-out loss below the base's: full {gains['full']:.2f}, LoRA {gains['lora']:.2f} nats per token; at least {MARGIN} is asked: "
        f"{'[green]yes[/]' if held else '[red]NO[/]'}. {time.monotonic() - began:.0f} s in all."
    )
    return 0 if held else 1


def timed(work) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def show(scores, models, seconds, counts) -> None:
    """The comparison on held-out pairs, and samples side by side."""
    from tuning.core import tree

    table = Table("", "loss", "perplexity", "exact tokens", "trained parameters", "seconds", title=f"{counts['eval']} held-out answers")
    for name, score in scores.items():
        m = models[name].model
        trained = tree.size(tree.split(m.layout, m.tuned)[0])
        table.add_row(
            name, f"{score['loss']:.3f}", f"{score['perplexity']:.1f}", f"{score['accuracy']:.1%}", f"{trained:,}", f"{seconds[name]:.0f}"
        )
    console.print(table)
    samples = Table("signature", *models, title="what each says, greedily")
    said = [model.generate(PROMPTS, max_new_tokens=24) for model in models.values()]
    for prompt, *texts in zip(PROMPTS, *said, strict=True):
        samples.add_row(prompt.strip(), *(text.strip() for text in texts))
    console.print(samples)


def say_what_next() -> None:
    console.print(
        f"exports: {HOME}/full/exports/hf (transformers loads it), {HOME}/lora/exports/peft (peft loads it)\n"
        f"curves:  pip install tensorboard && tensorboard --logdir {HOME}\n"
        "yours:   tuning train --config=configs/lora.py --config.model.path=FOLDER_OR_HUB_ID --config.data.train.path=DATA.jsonl "
        "--workdir=runs/mine",
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(main())
