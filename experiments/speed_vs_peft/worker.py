"""One side in its own process: reads how many steps to make from standard input, answers with one JSON line each time."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from experiments.speed_vs_peft import job as jobs
from experiments.speed_vs_peft.job import Job
from tuning import weights

# run(first step, last step) makes these steps and returns the last one's loss; peak() is the largest memory so far, in bytes
Side = tuple[Callable[[int, int], float], Callable[[], int]]


def ours(job: Job, directory: Path) -> Side:
    """This library, put together as `tuning train` does it."""
    import jax

    from tuning import build
    from tuning.core import mesh as meshes
    from tuning.core.types import Batch
    from tuning.training import state, step

    config = build.resolve(
        dict(
            model=dict(path=str(directory), dtype=job.dtype, remat="full" if job.remat else "none"),
            method=dict(name="lora", rank=job.rank, alpha=job.alpha) if job.method == "lora" else dict(name="full"),
            optimizer=dict(name="adamw", learning_rate=job.learning_rate, weight_decay=job.weight_decay),
        )
    )
    bind = lambda where: build.configs.bind(build.SECTIONS, config, where)  # noqa: E731
    source = bind("model")()
    m = build.model(source, bind("method")(build.outline(source)), meshes.over(jax.devices()[:1]))
    optimizer = bind("optimizer")(bind("optimizer.schedule")(1_000_000))
    place = meshes.rows(m.mesh)

    def put(number: int) -> Batch:
        return Batch(**{name: jax.device_put(x, place) for name, x in jobs.batch(job, number).items()})

    with jax.set_mesh(m.mesh):
        now = state.start(weights.start_params(m, 0), m.tuned, optimizer.transform, m.mesh)
        update = step.train_step(m.network.apply, bind("objective")(), optimizer.transform, accumulate=1, clip_norm=job.clip_norm, seed=0)
        compiled = step.jit(update, now, put(0))

    def run(first: int, last: int) -> float:
        nonlocal now
        means = None
        with jax.set_mesh(m.mesh):
            for number in range(first, last):
                now, means = compiled(now, put(number))
        assert means is not None
        jax.block_until_ready(now)
        return float(means["loss"].value)

    device = jax.devices()[0]
    return run, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use") or resident_peak()


def theirs(job: Job, directory: Path, compiled: bool = False) -> Side:
    """transformers, peft and torch: sdpa attention, fused AdamW, bfloat16 through autocast with float32 learning weights."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lora = job.method == "lora"
    dtype = getattr(torch, job.dtype) if lora else torch.float32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa", device_map=device)
    if job.remat:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=job.rank, lora_alpha=int(job.alpha), target_modules="all-linear"))
    model.train()
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=job.learning_rate, weight_decay=job.weight_decay, fused=True)
    forward = torch.compile(model) if compiled else model

    def inputs(number: int) -> dict:
        b = {name: torch.from_numpy(x).to(device) for name, x in jobs.batch(job, number).items()}
        segments, at = b["segments"], torch.arange(job.length, device=device)
        # Padding sees itself, since a softmax over nothing is not a number.
        mask = (segments[:, :, None] == segments[:, None, :]) & (at[:, None] >= at[None, :])
        labels = torch.full_like(b["tokens"], -100)
        labels[:, 1:] = torch.where(b["weights"][:, :-1] > 0, b["targets"][:, :-1], -100)
        return dict(
            input_ids=b["tokens"].long(),
            position_ids=b["positions"].long(),
            labels=labels.long(),
            attention_mask=mask[:, None],
            use_cache=False,
        )

    def run(first: int, last: int) -> float:
        loss = None
        for number in range(first, last):
            with torch.autocast(device, torch.bfloat16, enabled=job.dtype == "bfloat16"):
                loss = forward(**inputs(number)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learns, job.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert loss is not None
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return run, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak()


def compiled(job: Job, directory: Path) -> Side:
    """The same as `theirs`, through torch.compile."""
    return theirs(job, directory, compiled=True)


SIDES = {"ours": ours, "theirs": theirs, "compiled": compiled}


def resident_peak() -> int:
    """Largest resident set of this process, bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(side: str, settings: str, directory: str) -> None:
    job = Job(**json.loads(settings))
    # Both libraries size their thread pools by the cores that the process may run on.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    answers, sys.stdout = sys.stdout, sys.stderr
    run, peak = SIDES[side](job, Path(directory))
    done = 0
    for line in sys.stdin:
        count = int(line)
        began = time.perf_counter()
        loss = run(done, done + count)
        seconds = time.perf_counter() - began
        real = sum(jobs.tokens(jobs.batch(job, number)) for number in range(done, done + count))
        done += count
        print(json.dumps(dict(loss=loss, seconds=seconds, tokens=real, peak=peak())), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
