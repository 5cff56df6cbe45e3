"""Bytes and error of each way to keep a kernel, from real buffers.

python -m experiments.storage.run
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tuning.core import tree
from tuning.nn import quantised
from tuning.nn.quantised import Kind

SHAPE = (4096, 1024)
# 4-bit floats, two bits of exponent and one of fraction, to compare with; their scale puts a block's largest value at 6.
FP4 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def main() -> None:
    quantised.KINDS["fp4"] = Kind(FP4, 6.0)
    rng = np.random.default_rng(0)
    kernels = {
        "normal": jnp.asarray(rng.normal(size=SHAPE), jnp.float32),
        "heavy": jnp.asarray(rng.standard_t(5, size=SHAPE), jnp.float32),
    }
    print("| kind | block | scales | bytes per parameter | error, normal | error, heavy-tailed |\n|---|---:|---|---:|---:|---:|")
    for kind in ("int8", "nf4", "int4", "fp4"):
        for block in (32, 64, 128):
            for double in (False, True):
                run = jax.jit(functools.partial(quantised.quantise, kind=kind, block=block, double=double))
                kept = {name: run(kernel) for name, kernel in kernels.items()}
                errors = [relative(kernels[name], quantised.dequantise(q)) for name, q in kept.items()]
                size = tree.nbytes(kept["normal"]) / kernels["normal"].size
                shown = " | ".join(f"{100 * error:.2f} %" for error in errors)
                print(f"| {kind} | {block} | {'quantised' if double else 'float32'} | {size:.4f} | {shown} |")


def relative(kernel: jax.Array, back: jax.Array) -> float:
    """Norm of the difference over the norm of the kernel."""
    return float(jnp.linalg.norm(kernel - back) / jnp.linalg.norm(kernel))


if __name__ == "__main__":
    main()
