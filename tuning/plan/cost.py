"""What a step of a run computes, and what its devices can compute at most."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from tuning import build
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.methods.method import added
from tuning.nn import stack
from tuning.training import flops


def flops_per_token(parts: build.Parts, full: bool = False) -> float:
    """Model FLOPs of one trained token, attention counted over whole rows; `full` gives those of full tuning."""
    m, through, attention = parts.model, passes(parts), _attention(parts)
    shapes = {name: leaf.shape for name, leaf in tree.flatten(m.layout).items()}
    of_base = functools.partial(flops.flops_per_token, {n: x for n, x in shapes.items() if not added(n)})
    if full:
        return of_base(lambda name: True, attention, through)
    compared = of_base(lambda name: False, attention, through) if parts.base else 0.0
    return flops.flops_per_token(shapes, m.tuned, attention, through) + compared


def passes(parts: build.Parts) -> Callable[[str], float]:
    """How many times a token passes through the leaf of a name; see flops.flops_per_token."""
    m = parts.model
    shapes = {name: leaf.shape for name, leaf in tree.flatten(m.layout).items()}

    def through(name: str) -> float:
        if tree.matches(flops.INPUTS, name):
            inputs, tokens = (
                sum(share * getattr(rows.report, key) / len(rows) for _, rows, share in parts.sources) for key in ("input_tokens", "tokens")
            )
            return inputs / tokens
        routed = name.endswith("kernel") and len(shapes[name]) == 4
        return m.source.config.per_token / m.source.config.experts if routed else 1.0

    return through


def recomputed_per_token(parts: build.Parts, remat: str) -> float:
    """FLOPs of one trained token that the backward pass computes again under a rematerialisation policy; at most, if it ends above layers.

    "full" runs the layers once more, and "dots" what attention multiplies, which has batch axes and is not kept.
    """
    shapes = {name: leaf.shape for name, leaf in tree.flatten(parts.model.layout).items() if stack.layer_range(name)}
    forward = flops.flops_per_token(shapes, lambda name: False, _attention(parts), passes(parts))
    return {"none": 0.0, "dots": _attention(parts), "full": forward}[remat]


def hardware_flops_per_token(parts: build.Parts, remat: str | None = None) -> float:
    """Those of the model and those computed again, by the run's rematerialisation policy or another."""
    return flops_per_token(parts) + recomputed_per_token(parts, remat or parts.model.source.config.remat)


def exchanged_bytes(parts: build.Parts) -> float:
    """Bytes that a device receives from others in one update, each exchange counted as if it were made once and nothing were kept of it.

    Each microbatch gathers what fsdp splits, forward and backward, and reduces the gradients of what learns; each layer adds up what
    tensor splits, twice forward and twice backward, and an expert axis gathers the rows of all and adds up what its experts made of them.
    Rings: gathering or scattering over n devices brings n - 1 parts, adding up brings twice that share.
    """
    m, settings, sizes = parts.model, parts.settings, dict(parts.model.mesh.shape)
    around = lambda n: 2 * (n - 1) / n  # noqa: E731
    total = 0.0
    for name, leaf in tree.flatten(m.layout).items():
        for array in jax.tree.leaves(leaf):
            split = {axis for part in array.sharding.spec if part for axis in ((part,) if isinstance(part, str) else part)}
            held = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
            if "fsdp" in split:
                total += held * (sizes["fsdp"] - 1) * (3 if m.tuned(name) else 2)
            if m.tuned(name):
                total += held * around(math.prod(sizes[axis] for axis in meshes.RULES["batch"] if axis not in split))
    total *= settings.accumulate
    config = m.source.config
    hidden = settings.batch_size * parts.train.length // meshes.row_count(m.mesh) * config.width * jax.numpy.dtype(config.dtype).itemsize
    return total + config.layers * hidden * (4 * around(sizes["tensor"]) + 4 * (sizes["expert"] - 1))


def _attention(parts: build.Parts) -> float:
    """Forward FLOPs of a token in the scores of all layers and their use."""
    return parts.model.source.config.attention_flops(*(length for length in (parts.train.length, parts.train.input_length) if length))


def peak_flops(where: Mesh) -> float | None:
    """bf16 peak of all devices of the mesh, FLOP/s; None where it is not known."""
    one = flops.peak_flops(where.devices.flat[0])
    return None if one is None else one * where.size
