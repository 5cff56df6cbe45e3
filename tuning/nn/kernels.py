"""Attention as a kernel of the device: splash attention on TPU, cuDNN's on GPU; what each can do, and on which part of a mesh.

Shapes: B sequences, T queries, S keys, N query heads, K key-value heads, H head width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tuning.core import mesh
from tuning.nn.blockwise import How, Marks, visible

# The forms of attention, and of what the length of a sequence must be a multiple. `splash_interpreted` is splash on any device, slowly: to
# check it. What the kernels cannot do, and other devices, take `blockwise`.
MULTIPLES = {"blockwise": 1, "splash": 128, "splash_interpreted": 128, "cudnn": 2}
NATIVE = {"tpu": "splash", "gpu": "cudnn"}  # by platform


class Needs(NamedTuple):
    """What a network asks of attention in a whole sequence. length: of the sequence, None where it is not known yet."""

    dtype: str
    head_dim: int
    softcap: float
    dropout: float
    bias: bool
    prefix: int
    length: int | None = None


def choose(form: str, platform: str, needs: Needs) -> tuple[str, str]:
    """(the form of attention on devices of a platform, why it is not the one that was asked for). "auto" asks for the platform's kernel."""
    if form == "auto" and platform == "gpu":  # until it has been: what cannot be had there would stop a run that needs it not
        return "blockwise", "cudnn: not run on a GPU by us yet; model.attention=cudnn asks for it"
    form = NATIVE.get(platform, "blockwise") if form == "auto" else form
    if form not in MULTIPLES:
        raise ValueError(f"model.attention={form!r} is not one of auto, {', '.join(MULTIPLES)}.")
    if form == "blockwise":
        return form, ""
    n, cudnn = needs, form == "cudnn"
    reasons = {
        f"not for {platform} devices": form in NATIVE.values() and form != NATIVE.get(platform),
        "positions enter as a bias on the scores": n.bias,
        f"attention_dropout={n.dropout}, and a kernel drops no shares": n.dropout,
        f"{n.prefix} keys stand before the sequence": n.prefix,
        f"dtype={n.dtype}, and cuDNN's attention computes in bfloat16": cudnn and n.dtype != "bfloat16",
        f"head_dim={n.head_dim} is more than 128, or no multiple of 8": cudnn and (n.head_dim > 128 or n.head_dim % 8),
        f"softcap={n.softcap}, which cuDNN's attention has not": cudnn and n.softcap,
        f"length={n.length} is no multiple of {MULTIPLES[form]}": n.length is not None and n.length % MULTIPLES[form],
    }
    why = next((reason for reason, holds in reasons.items() if holds), "")
    return ("blockwise", f"{form}: {why}") if why else (form, "")


def takes(form: str, length: int) -> bool:
    """Whether the form is a kernel, and takes sequences of this length."""
    return form != "blockwise" and length // mesh.pieces(length, "sequence") % MULTIPLES[form] == 0


class Settings(NamedTuple):
    form: str
    how: How


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(settings: Settings, q_BTNH, k_BSKH, v_BSKH, marks: Marks) -> jax.Array:
    """What `blockwise.attend` computes of a whole sequence that looks at itself, on the devices of `jax.set_mesh`: each for its own rows of
    the batch and its own heads.

    Kernels go by places in the row: a segment's tokens must be neighbours, and their positions rise by one. bfloat16 is multiplied as it
    is, and float32 with the precision that `how` says.
    """
    return _forward(settings, q_BTNH, k_BSKH, v_BSKH, marks)[0]


def _precision(settings: Settings, x: jax.Array):
    return jax.default_matmul_precision(settings.how.precision if x.dtype == jnp.float32 else "default")


def _forward(settings, q_BTNH, k_BSKH, v_BSKH, marks):
    # Padding sees padding in splash; nothing is to come of it, nor to go back into it.
    mute = lambda y_BTNH: jnp.where((marks.segments != 0)[..., None, None], y_BTNH, 0)  # noqa: E731
    with _precision(settings, q_BTNH):
        y, back = jax.vjp(lambda q, k, v: mute(_spread(settings, q, k, v, marks)), q_BTNH, k_BSKH, v_BSKH)
    return y, back


def _backward(settings, back, dy_BTNH):
    with _precision(settings, dy_BTNH):
        return *back(dy_BTNH), None


attend.defvjp(_forward, _backward)


def _spread(settings: Settings, q_BTNH, k_BSKH, v_BSKH, marks: Marks) -> jax.Array:
    here, (T, N) = mesh.here(), q_BTNH.shape[1:3]
    parts, form = mesh.pieces(T, "sequence"), cudnn if settings.form == "cudnn" else splash
    alike = settings.how.window is None and not settings.how.causal  # a part of the queries sees what all see
    kernel = None if form is cudnn else splash_kernel(settings, T // parts, T, N // mesh.pieces(N, "heads"), 1 if alike else parts)
    if here.empty or here.size == 1:
        return form(settings, kernel, q_BTNH, k_BSKH, v_BSKH, marks, marks)
    if mesh.pieces(N, "heads") != mesh.pieces(k_BSKH.shape[2], "kv_heads"):  # fewer key-value heads than parts
        k_BSKH, v_BSKH = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    batch, sequence, heads, _ = own = mesh.spec(q_BTNH.shape, ("batch", "sequence", "heads", None), here)
    place = kernel and kernel.manual_sharding_spec(NamedSharding(here, P(None, None if alike else sequence)))
    keys, marked = P(batch, None, heads), (Marks(x, x) for x in (P(batch, sequence), P(batch)))
    specs, axes = (place, own, keys, keys, *marked), set(here.axis_names)
    run = jax.shard_map(functools.partial(form, settings), in_specs=specs, out_specs=own, axis_names=axes, check_vma=False)
    return run(kernel, q_BTNH, k_BSKH, v_BSKH, marks, marks)


def splash_kernel(settings: Settings, own: int, length: int, heads: int, parts: int) -> splash_attention_kernel.SplashAttentionKernel:
    """Splash attention of jax.experimental.pallas: blocks that no query sees are not computed, and no mask is read from memory.

    own, heads  queries of a sequence, and their heads, on one device
    parts       that the kernel is split into, for devices with queries from different places
    """
    how, masks, shape = settings.how, splash_attention_mask, (own * parts, length)
    reach = None if how.window is None else how.window - 1
    sides = reach, 0 if how.causal else reach
    mask = masks.FullMask(shape) if sides == (None, None) else masks.LocalMask(shape, sides, 0)
    size = next(size for size in (512, 384, 256, 128) if own % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes: dict[str, Any] = dict.fromkeys(names, size)
    return splash_attention_kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        attn_logits_soft_cap=how.softcap or None, head_shards=1, q_seq_shards=parts, interpret=settings.form == "splash_interpreted",
    )  # fmt: skip


def splash(settings: Settings, kernel, q_BTNH, k_BSKH, v_BSKH, queries: Marks, keys: Marks) -> jax.Array:
    def row(q_NTH, k_KSH, v_KSH, queries_T, keys_S):
        return kernel(q_NTH, k_KSH, v_KSH, segment_ids=splash_attention_kernel.SegmentIds(queries_T, keys_S))

    q_BTNH = (q_BTNH.astype(jnp.float32) * settings.how.scale).astype(q_BTNH.dtype)  # splash does not scale
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BSKH, v_BSKH))
    return jax.vmap(row)(q, k, v, queries.segments, keys.segments).transpose(0, 2, 1, 3)


def cudnn(settings: Settings, _, q_BTNH, k_BSKH, v_BSKH, queries: Marks, keys: Marks) -> jax.Array:
    """cuDNN's fused attention, for bfloat16. Lowered for CUDA in the tests, and not run: there was no GPU.

    Its packed form wants a bound on the segments of a row, and works as if each row had so many; so segments and windows enter as a mask
    [B, 1, T, S] of 2 bytes each, which all heads share. `is_causal` says nothing new, but lets it leave out half of the work.
    """
    how, (T, S) = settings.how, (q_BTNH.shape[1], k_BSKH.shape[1])
    mask_B1TS = visible(how, queries, keys)[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, scale=how.scale, is_causal=how.causal and T == S, implementation="cudnn"
    )
