"""The same updates in torch (transformers, peft) and here, from the same weights, on the same batches: the losses side by side.

python -m experiments.torch_parity.run --data=../shared/data/gsm8k/train.jsonl

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tuning import build, export, weights
from tuning.data import loader
from tuning.training import state, step

# (up to this step, largest relative difference of the losses). Rounding grows: every update starts from what the last one left.
BOUNDS = ((1, 1e-5), (10, 1e-4), (50, 1e-3))

SIZES = dict(
    hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    max_position_embeddings=1024, initializer_range=0.05,
)  # fmt: skip


METHODS: dict[str, dict[str, Any]] = {
    "full": dict(name="full"),
    "lora": dict(name="lora", rank=8, alpha=16.0),
    "dora": dict(name="lora", rank=8, alpha=16.0, dora=True),
    "ia3": dict(name="ia3"),
    "prompt": dict(name="prompt", length=8),
    "prefix": dict(name="prefix", length=8),
}


RATES = {"full": 2e-3, "ia3": 0.1, "prompt": 0.1, "prefix": 0.1}


@dataclasses.dataclass(frozen=True)
class Update:
    """What one side says of one update: the loss before it (nats per learned token), and the gradient's global norm before clipping."""

    loss: float
    grad_norm: float


def write_checkpoint(directory: Path, texts: Sequence[str], *, vocab_size: int = 1024, tied: bool = False, **sizes: Any) -> None:
    """A random Llama with a byte-level BPE tokenizer of these texts, as transformers saves both; `sizes` replace those of SIZES."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    )
    words = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    words.save_pretrained(directory)
    torch.manual_seed(0)
    end = words.convert_tokens_to_ids("<|end|>")
    config = LlamaConfig(**{**SIZES, **sizes}, vocab_size=len(words), tie_word_embeddings=tied, bos_token_id=None, eos_token_id=end)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def config(checkpoint: Path, data: Path, *, method: str, pack: bool, steps: int, length: int = 256) -> dict[str, Any]:
    """A run as a user writes it, with one of METHODS. Weight decay, clipping and the schedule are all on."""
    decay = {} if METHODS[method]["name"] in ("full", "lora") else dict(decay=".*")
    pairs = dict(name="pairs", prompt="{question}\n", completion="{answer}")
    return dict(
        model=dict(path=str(checkpoint)),
        method=METHODS[method],
        data=dict(train=dict(path=str(data), length=length, pack=pack, overlong="drop", format=pairs)),
        optimizer=dict(
            name="adamw", learning_rate=RATES.get(method, 1e-2), b2=0.98, weight_decay=0.1, **decay,
            schedule=dict(name="cosine", warmup_steps=min(5, steps // 2)),
        ),
        train=dict(steps=steps, batch_size=8, clip_norm=0.3),
    )  # fmt: skip


def ours(run: Mapping[str, Any], adapter: Path) -> tuple[list[Update], list[dict[str, np.ndarray]]]:
    """The updates of this library, and the batches they were made on. Writes what is added to `adapter`, as PEFT has it."""
    parts = build.parts(run)
    m, seed, updates, batches = parts.model, parts.config["seed"], [], []
    with jax.set_mesh(m.mesh):
        data = loader.Loader(parts.train, batch_size=parts.settings.batch_size, seed=seed, mesh=m.mesh)
        params = weights.start_params(m, seed)
        if parts.config["method"]["name"] != "full":
            export.write(m, params, parts.config["method"], adapter, "peft", merge=False)
        now = state.start(params, m.tuned, parts.optimizer.transform, m.mesh)
        compiled = step.jit(parts.train_step(seed), now, data.batch(0))
        for number in range(parts.settings.steps):
            batch = data.batch(number)
            now, means = compiled(now, batch)
            updates.append(Update(float(means["loss"].value), float(means["grad_norm"].value)))
            batches.append({field.name: np.asarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)})
    return updates, batches


def theirs(run: Mapping[str, Any], adapter: Path, batches: Sequence[Mapping[str, np.ndarray]]) -> list[Update]:
    """The updates of torch on these batches: transformers' model and loss, peft's adapter, torch's AdamW, scheduler and clipping."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    c = build.resolve(run)
    model: Any = AutoModelForCausalLM.from_pretrained(c["model"]["path"], dtype=torch.float32, attn_implementation="sdpa")
    if c["method"]["name"] != "full":
        said = peft.PeftConfig.from_pretrained(str(adapter))
        said.inference_mode = False
        model = peft.get_peft_model(model, said)
        peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(str(adapter)))
    model.train()
    learns = [p for p in model.parameters() if p.requires_grad]
    settings = c["optimizer"]
    groups = [  # matrices decay, norms do not
        dict(params=[p for p in learns if p.ndim >= 2], weight_decay=settings["weight_decay"]),
        dict(params=[p for p in learns if p.ndim < 2], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"], betas=(settings["b1"], settings["b2"]), eps=settings["eps"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda made: cosine(made, c["train"]["steps"], **settings["schedule"]))
    updates = []
    slots = c["method"]["length"] if c["method"]["name"] == "prompt" else 0
    for batch in batches:
        batch = {name: values[:, slots:] for name, values in batch.items() if values.ndim == 2}  # peft puts its prompt there by itself
        loss = model(**inputs(batch, pack=c["data"]["train"]["pack"]), use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learns, c["train"]["clip_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        updates.append(Update(loss.item(), norm.item()))
    return updates


def cosine(made: int, steps: int, *, name: str, warmup_steps: int, final: float) -> float:
    """The multiplier of the learning rate after `made` updates, written down a second time, in plain Python."""
    import math

    assert name == "cosine"
    if made < warmup_steps:
        return made / warmup_steps
    part = min(1.0, (made - warmup_steps) / (steps - warmup_steps))
    return final + (1 - final) * (1 + math.cos(math.pi * part)) / 2


def inputs(batch: Mapping[str, np.ndarray], *, pack: bool) -> dict[str, Any]:
    """A batch as transformers takes it. Packed rows: positions that start over, and a mask [B, 1, T, T]; padded rows: the usual mask."""
    import torch

    tokens, segments = (torch.tensor(batch[name]).long() for name in ("tokens", "segments"))
    learned = batch["weights"][:, :-1] > 0
    assert set(np.unique(batch["weights"])) <= {0.0, 1.0} and not batch["weights"][:, -1].any()
    labels = np.full(batch["tokens"].shape, -100)
    labels[:, 1:][learned] = batch["tokens"][:, 1:][learned]  # transformers shifts them by itself
    known = dict(input_ids=tokens, labels=torch.from_numpy(labels))
    if not pack:
        return dict(known, attention_mask=(segments != 0).long())
    same = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
    mask = torch.zeros(same.shape).masked_fill(~same.tril(), torch.finfo(torch.float32).min)[:, None]
    return dict(known, attention_mask=mask, position_ids=torch.tensor(batch["positions"]).long())


def differences(mine: Sequence[Update], torchs: Sequence[Update]) -> list[float]:
    """Relative difference of the losses, update by update."""
    return [abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(mine, torchs, strict=True)]


def bound(number: int) -> float:
    """The largest difference allowed at a step, counted from 1."""
    return next((most for last, most in BOUNDS if number <= last), BOUNDS[-1][1])


def compare(run: Mapping[str, Any]) -> tuple[list[Update], list[Update]]:
    """(our updates, torch's) of one run."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        mine, batches = ours(run, adapter)
        return mine, theirs(run, adapter, batches)


def report(title: str, mine: Sequence[Update], torchs: Sequence[Update]) -> bool:
    """Prints the table of one run; whether every step is within its bound."""
    print(f"{title}\n\n{'step':>4} {'tuning':>12} {'torch':>12} {'difference':>11} {'bound':>8} {'grad norm':>10} {'difference':>11}")
    good = True
    for number, (a, b, gap) in enumerate(zip(mine, torchs, differences(mine, torchs), strict=True), 1):
        inside = gap <= bound(number)
        good &= inside
        norms = abs(a.grad_norm - b.grad_norm) / b.grad_norm
        print(
            f"{number:4} {a.loss:12.7f} {b.loss:12.7f} {gap:11.1e} {bound(number):8.0e} {a.grad_norm:10.5f} {norms:11.1e}"
            f"{'' if inside else '   too far'}"
        )
    print()
    return good


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data", type=Path, default=Path(__file__).resolve().parents[3] / "shared/data/gsm8k/train.jsonl", help="gsm8k's train.jsonl"
    )
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = p.parse_args(argv)
    if not args.data.is_file():
        p.error(f"--data={args.data}: no such file. Download train.jsonl of openai/grade-school-math, and say where it is.")
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    broken = []
    with tempfile.TemporaryDirectory() as folder:
        for tied in (False, True):
            checkpoint = Path(folder) / ("tied" if tied else "untied")
            write_checkpoint(checkpoint, [row[key] for row in rows for key in ("question", "answer")], tied=tied)
            for method in args.methods:
                # Both ways to make rows, on either kind of head. What peft puts before a row, it puts there once.
                pack = tied == (method != "full") and method not in ("prompt", "prefix")
                title = f"{method}, {'packed' if pack else 'padded'} rows, {'tied' if tied else 'untied'} embedding"
                if not report(title, *compare(config(checkpoint, args.data, method=method, pack=pack, steps=args.steps))):
                    broken.append(title)
    print(f"Out of bounds: {'; '.join(broken)}" if broken else "Every loss is within its bound.")
    return bool(broken)


if __name__ == "__main__":
    raise SystemExit(main())
