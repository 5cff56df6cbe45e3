"""Attention as a kernel of the device: splash attention on TPU, cuDNN's on GPU; what each can do, and on which part of a mesh.

Shapes: B sequences, T tokens, N query heads, K key-value heads, H head width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

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
    return form != "blockwise" and length % MULTIPLES[form] == 0


class Settings(NamedTuple):
    form: str
    how: How


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(settings: Settings, q_BTNH, k_BTKH, v_BTKH, marks: Marks) -> jax.Array:
    """What `blockwise.attend` computes of a whole sequence that looks at itself, on the devices of `jax.set_mesh`: each for its own rows of
    the batch and its own heads.

    Kernels go by places in the row: a segment's tokens must be neighbours, and their positions rise by one. bfloat16 is multiplied as it
    is, and float32 with the precision that `how` says.
    """
    return _forward(settings, q_BTNH, k_BTKH, v_BTKH, marks)[0]


def _precision(settings: Settings, x: jax.Array):
    return jax.default_matmul_precision(settings.how.precision if x.dtype == jnp.float32 else "default")


def _forward(settings, q_BTNH, k_BTKH, v_BTKH, marks):
    # Padding sees padding in splash; nothing is to come of it, nor to go back into it.
    mute = lambda y_BTNH: jnp.where((marks.segments != 0)[..., None, None], y_BTNH, 0)  # noqa: E731
    with _precision(settings, q_BTNH):
        y, back = jax.vjp(lambda q, k, v: mute(_spread(settings, q, k, v, marks)), q_BTNH, k_BTKH, v_BTKH)
    return y, back


def _backward(settings, back, dy_BTNH):
    with _precision(settings, dy_BTNH):
        return *back(dy_BTNH), None


attend.defvjp(_forward, _backward)


def _spread(settings: Settings, q_BTNH, k_BTKH, v_BTKH, marks: Marks) -> jax.Array:
    here = jax.sharding.get_abstract_mesh()
    local = functools.partial({"cudnn": cudnn}.get(settings.form, splash), settings)
    if here.empty or here.size == 1:
        return local(q_BTNH, k_BTKH, v_BTKH, marks)
    split = lambda x, axis: mesh.spec(x.shape, ("batch", None, axis, None), here)  # noqa: E731
    rows = mesh.spec(marks.segments.shape, ("batch", None), here)
    if split(q_BTNH, "heads") != split(k_BTKH, "kv_heads"):  # there are fewer key-value heads than parts
        k_BTKH, v_BTKH = (jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    heads = split(q_BTNH, "heads")
    run = jax.shard_map(local, in_specs=(heads, heads, heads, Marks(rows, rows)), out_specs=heads, check_vma=False)
    return run(q_BTNH, k_BTKH, v_BTKH, marks)


def splash(settings: Settings, q_BTNH, k_BTKH, v_BTKH, marks: Marks) -> jax.Array:
    """Splash attention of jax.experimental.pallas: blocks that no query sees are not computed, and no mask is read from memory."""
    how, (T, N) = settings.how, q_BTNH.shape[1:3]
    sides = (None if how.window is None else how.window - 1, 0 if how.causal else None if how.window is None else how.window - 1)
    masks = splash_attention_mask
    mask = masks.FullMask((T, T)) if sides == (None, None) else masks.LocalMask((T, T), sides, 0)
    size = next(size for size in (512, 384, 256, 128) if T % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = splash_attention_kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * N), block_sizes=splash_attention_kernel.BlockSizes(**dict.fromkeys(names, size)),
        attn_logits_soft_cap=how.softcap or None, head_shards=1, q_seq_shards=1, interpret=settings.form == "splash_interpreted",
    )  # fmt: skip

    def row(q_NTH, k_KTH, v_KTH, segments_T):
        return kernel(q_NTH, k_KTH, v_KTH, segment_ids=splash_attention_kernel.SegmentIds(segments_T, segments_T))

    q_BTNH = (q_BTNH.astype(jnp.float32) * how.scale).astype(q_BTNH.dtype)  # splash does not scale
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BTKH, v_BTKH))
    return jax.vmap(row)(q, k, v, marks.segments).transpose(0, 2, 1, 3)


def cudnn(settings: Settings, q_BTNH, k_BTKH, v_BTKH, marks: Marks) -> jax.Array:
    """cuDNN's fused attention, for bfloat16. Lowered for CUDA in the tests, and not run: there was no GPU.

    Its packed form wants a bound on the segments of a row, and works as if each row had so many; so segments and windows enter as a mask
    [B, 1, T, T] of 2 bytes each, which all heads and layers share. `is_causal` says nothing new, but lets it leave out half of the work.
    """
    how = settings.how
    mask_B1TT = visible(how, marks, marks)[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TT, scale=how.scale, is_causal=how.causal, implementation="cudnn"
    )
