"""Routed experts: each token passes through the few feed-forward layers that its router chooses (Shazeer et al., 2017, arXiv:1701.06538).

No expert has a capacity and no token is dropped. Shapes: B sequences, T tokens, D width, E experts, K experts per token, F hidden width of
an expert; S = B T tokens in one row, M = S K choices of all tokens, ordered by expert; X a device's own experts.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_batching import sequential_vmap
from jax.sharding import PartitionSpec as P

from tuning.core import keys, mesh
from tuning.core.types import Mean
from tuning.nn import weight
from tuning.nn.linear import Linear
from tuning.nn.mlp import ACTIVATIONS
from tuning.nn.sites import NOTHING, Site

Sums = dict[str, jax.Array]
KEPT = ("cond", "custom_vmap_call", "scan", "while", "ragged_dot_general", "dot_general", "top_k", "sort", "cumsum")
ROWS = 1024  # of an expert, at a time: enough that its multiplications, not reading its kernels, take the time


class How(NamedTuple):
    """experts: in all; precision: of the products; axis: of the mesh, that splits the experts, if any; gathers: whether it splits the rows
    too, which then come from all of its devices and go back to them."""

    experts: int
    activation: str
    precision: str | None
    axis: str | None = None
    gathers: bool = False


per_expert = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))


class Experts(nnx.Module):
    """One projection of every expert: kernel [E, in, out], stored in any way."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str, str, str], rngs: nnx.Rngs):
        self.kernel = nnx.Param(per_expert(rngs.params(), shape), out_sharding=axes)


class MoE(nnx.Module):
    """sum over the K chosen experts of share * down(activation(gate(x)) * up(x)); a share is the router's softmax over all experts.

    normalize  whether the K shares are divided by their sum
    Neither router nor experts are sites: adapters leave them as they are, as PEFT does, and full and partial tuning train them.
    Logits and shares are float32 whatever the dtype of the rest. The references multiply x by the router in their own dtype and take the
    softmax in float32, which is the same in float32.
    """

    def __init__(
        self, width: int, hidden: int, experts: int, per_token: int, activation: str, normalize: bool,
        layers: range, rngs: nnx.Rngs,
    ):  # fmt: skip
        if not 1 <= per_token <= experts:
            raise ValueError(f"per_token={per_token} experts of {experts}: a token goes to at least one expert and at most to all of them.")
        self.router = Linear(Site("mlp/router", (width, experts), ("embed", "router"), layers), NOTHING, rngs)
        self.gate = Experts((experts, width, hidden), ("experts", "embed", "mlp"), rngs)
        self.up = Experts((experts, width, hidden), ("experts", "embed", "mlp"), rngs)
        self.down = Experts((experts, hidden, width), ("experts", "mlp", "embed"), rngs)
        self.per_token, self.activation, self.normalize = per_token, activation, normalize

    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Sums]:
        """y_BTD, and sums over the tokens that are `real` (not padding) for `balance`: chosen_E, probability_E, tokens."""
        logits_BTE = self.router(x_BTD.astype(jnp.float32), keys.fold(key, "mlp/router"))
        kernels = [weight.cast(experts.kernel.get_value(), x_BTD.dtype) for experts in (self.gate, self.up, self.down)]
        settings = self.per_token, self.normalize, self.activation
        return spread(settings, x_BTD, logits_BTE, real_BT, *kernels)


def balance(sums: Sums) -> Mean:
    """The load balancing loss (Fedus et al., 2021, arXiv:2101.03961, eq. 4 to 6), from the sums of all layers added up.

    E * sum over experts of the share of tokens that chose it times its mean probability: K if all experts are equally loaded. The shares
    are over all layers at once, and each of a token's K choices counts as one.
    """
    tokens = sums["tokens"]
    total = sums["chosen_E"].size * (sums["chosen_E"] * sums["probability_E"]).sum() / jnp.maximum(tokens, 1)
    return Mean(total, tokens)


def spread(settings, x_BTD, logits_BTE, real_BT, gate_EDF, up_EDF, down_EFD) -> tuple[jax.Array, Sums]:
    """`route` on the devices of `jax.set_mesh`, each for its own rows of the batch, its own experts and its own part of F.

    Where the axis `expert` splits both the rows and the experts, every device of the axis gathers the rows of all, some at a time, works
    with the experts that it has, and the results are added on the way back to where the rows belong. (Sending each token only to its
    experts would move less, but the messages would need a fixed size, and tokens beyond it would be dropped.) One device's part of a
    program over that axis (`jax.shard_map`) does just this.
    """
    here = mesh.here()
    if here.empty or here.size == 1:
        axis = "expert" if mesh.inside() else None
        return route(settings, x_BTD, logits_BTE, real_BT, gate_EDF, up_EDF, down_EFD, axis=axis, gathers=axis is not None)
    rows = mesh.spec(x_BTD.shape, ("batch", "sequence", None), here)
    expert, fsdp, tensor = mesh.spec(up_EDF.shape, ("experts", "embed", "mlp"), here)
    into, out = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    parts = [weight.parted(kernel, names, here) for kernel, names in ((gate_EDF, into), (up_EDF, into), (down_EFD, out))]
    kernels, places = zip(*parts, strict=True)
    gathers = expert is not None and rows[0] is not None
    apart = tuple(axis for axis in (None if gathers else expert, tensor) if axis is not None)

    def gathered(leaf, spec):
        for axis in (i for i, name in enumerate(spec) if name is not None and name == fsdp):
            leaf = jax.lax.all_gather(leaf, fsdp, axis=axis, tiled=True)
        return leaf

    # For the backward pass products are kept, and which rows they are of; what else there is, is made again from these. Whole kernels of a
    # layer are gathered again: kept, those of all layers would lie on every device.
    @functools.partial(jax.checkpoint, policy=lambda primitive, *_, **__: primitive.name in KEPT, prevent_cse=False)
    def local(x_BTD, logits_BTE, real_BT, gate, up, down):
        gate, up, down = (jax.tree.map(gathered, *pair) for pair in zip((gate, up, down), places, strict=True))
        y_BTD, sums = route(settings, x_BTD, logits_BTE, real_BT, gate, up, down, axis=expert, gathers=gathers)
        return y_BTD[None], jax.tree.map(lambda x: x[None], sums)

    # What is still to be added up leaves with an axis of its own and is added outside: a sum inside would be repeated in the backward pass.
    specs = (rows, rows, P(*rows[:2]), *places)
    outs = P(apart or None, *rows), P(mesh.names(rows) or None)
    run = jax.shard_map(local, in_specs=specs, out_specs=outs, axis_names=set(here.axis_names), check_vma=False)
    y, sums = run(x_BTD, logits_BTE, real_BT, *kernels)
    return mesh.constrain(jax.lax.reduce_sum(y, (0,)), "batch", "sequence", None), jax.tree.map(lambda x: x.sum(0), sums)


def route(settings, x_BTD, logits_BTE, real_BT, gate_XDF, up_XDF, down_XFD, axis=None, gathers=False) -> tuple[jax.Array, Sums]:
    """The sum over those chosen experts that are among the X given, and the sums for `balance` over the rows given.

    axis     the mesh axis that splits the experts, if any
    gathers  whether it splits the rows too
    """
    K, normalize, activation = settings
    E = logits_BTE.shape[-1]
    probability_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    share_BTK, chosen_BTK = jax.lax.top_k(probability_BTE, K)
    if normalize:
        share_BTK = share_BTK / share_BTK.sum(-1, keepdims=True)
    real_BT1 = real_BT.astype(jnp.float32)[..., None]
    sums = {
        "chosen_E": (jax.nn.one_hot(chosen_BTK, E).sum(2) * real_BT1).sum((0, 1)),
        "probability_E": (probability_BTE * real_BT1).sum((0, 1)),
        "tokens": real_BT1.sum(),
    }
    x_SD, share_SK, chosen_SK = (y.reshape(-1, y.shape[-1]) for y in (x_BTD, share_BTK, chosen_BTK))
    how = How(E, activation, jax.config.jax_default_matmul_precision, axis, gathers)  # pyright: ignore[reportAttributeAccessIssue]
    form = mix_in_pieces if pieces(how, chosen_SK.shape) > 1 else mix
    y_SD = form(how, x_SD, share_SK, chosen_SK, gate_XDF, up_XDF, down_XFD)
    return y_SD.reshape(x_BTD.shape), sums  # pyright: ignore[reportAttributeAccessIssue]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix_in_pieces(how: How, x_SD, share_SK, chosen_SK, gate_XDF, up_XDF, down_XFD) -> jax.Array:
    """`mix`, of so many tokens at a time that ROWS of their choices fall on an expert on average.

    What lies between the projections is as large as if every choice fell on an expert that is here, and what other devices send comes to
    all their rows. So each piece of the tokens has it for itself, and the backward pass makes it again. The gradients of kernels that learn
    are added up in float32.
    """
    count, kernels = pieces(how, chosen_SK.shape), (gate_XDF, up_XDF, down_XFD)
    y = jax.lax.map(lambda given: mix(how, *given, *kernels), _cut(count, (x_SD, share_SK, chosen_SK)))  # pyright: ignore
    return y.reshape(x_SD.shape)


def pieces(how: How, choices: tuple[int, ...]) -> int:
    """Into how many pieces (S tokens, K choices of each) are cut: a power of two that divides S."""
    tokens, per_token = choices
    devices = jax.lax.axis_size(how.axis) if how.gathers else 1
    most = max(1, devices * tokens * per_token // (ROWS * how.experts))
    return min(tokens & -tokens, 1 << (most.bit_length() - 1))


def _cut(count: int, rows: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(count, -1, x.shape[1]), rows)


def _mixed_forward(how, *leaves):
    x_SD, share_SK, chosen_SK, *kernels = values = jax.tree.map(lambda leaf: leaf.value, leaves)
    learn = any(leaf.perturbed for leaf in jax.tree.leaves(leaves[3:]))
    return mix_in_pieces(how, *values), (x_SD, share_SK, chosen_SK, kernels, kernels if learn else [])


def _mixed_backward(how, kept, dy_SD):
    x_SD, share_SK, chosen_SK, kernels, learning = kept

    def piece(sums, given):
        x, share, chosen, dy = given
        _, pull = jax.vjp(lambda x, share, *own: mix(how, x, share, chosen, *(own or kernels)), x, share, *learning)
        dx, dshare, *gradients = pull(dy)
        return [total + one.astype(jnp.float32) for total, one in zip(sums, gradients, strict=True)], (dx, dshare)

    pieced = _cut(pieces(how, chosen_SK.shape), (x_SD, share_SK, chosen_SK, dy_SD))
    sums, (dx, dshare) = jax.lax.scan(piece, [jnp.zeros(kernel.shape, jnp.float32) for kernel in learning], pieced)
    gradients = [total.astype(kernel.dtype) for total, kernel in zip(sums, learning, strict=True)] or [None] * 3
    return dx.reshape(x_SD.shape), dshare.reshape(share_SK.shape), None, *gradients


mix_in_pieces.defvjp(_mixed_forward, _mixed_backward, symbolic_zeros=True)


def mix(how: How, x_SD, share_SK, chosen_SK, gate_XDF, up_XDF, down_XFD) -> jax.Array:
    """The sum over the experts that are here, [S, D]; of what all devices of the axis have, if their rows are gathered."""
    X = up_XDF.shape[0]
    if how.gathers:
        x_SD, share_SK, chosen_SK = (jax.lax.all_gather(y, how.axis, tiled=True) for y in (x_SD, share_SK, chosen_SK))
    if how.axis:
        chosen_SK = chosen_SK - jax.lax.axis_index(how.axis) * X
    here_SK = (chosen_SK >= 0) & (chosen_SK < X)
    expert_M = jnp.where(here_SK, chosen_SK, X).reshape(-1)
    order_M = jnp.argsort(expert_M)
    back_M = jnp.argsort(order_M)
    sizes_X = (expert_M[:, None] == jnp.arange(X)[None]).sum(0, dtype=jnp.int32)
    # Nothing may come in from the rows past the last expert's, where a grouped product may leave anything, NaN too.
    inside_M1 = (jnp.arange(expert_M.size) < sizes_X.sum())[:, None]
    settings = block_size(expert_M.size, how.experts), how.precision

    def multiply(x, kernel) -> jax.Array:
        return grouped(settings, x, kernel, sizes_X)  # pyright: ignore[reportReturnType]

    @functools.partial(jax.checkpoint, prevent_cse=False)  # as in a layer without experts
    def gated(gate, up):
        gate, up = (jnp.where(inside_M1, y, 0) for y in (gate, up))
        return ACTIVATIONS[how.activation](gate) * up

    x_MD = to_experts(x_SD, here_SK, order_M, back_M)
    y_MD = multiply(gated(multiply(x_MD, gate_XDF), multiply(x_MD, up_XDF)), down_XFD)
    y_SD = to_tokens(y_MD, share_SK, here_SK, order_M, back_M)
    return jax.lax.psum_scatter(y_SD, how.axis, tiled=True) if how.gathers else y_SD


# Both directions and their backward passes gather; left to itself, the backward pass of a gather would scatter.


@jax.custom_vjp
def to_experts(x_SD: jax.Array, here_SK: jax.Array, order_M: jax.Array, back_M: jax.Array) -> jax.Array:
    """Each token once for each of its choices, in the order of the experts, [M, D]; back undoes order."""
    return x_SD[order_M // here_SK.shape[1]]


def _to_experts_backward(kept, d_MD):
    here_SK, back_M = kept
    return _choices(d_MD, here_SK, back_M).sum(1), None, None, None


to_experts.defvjp(
    lambda x_SD, here_SK, order_M, back_M: (to_experts(x_SD, here_SK, order_M, back_M), (here_SK, back_M)), _to_experts_backward
)


@jax.custom_vjp
def to_tokens(y_MD: jax.Array, share_SK: jax.Array, here_SK: jax.Array, order_M: jax.Array, back_M: jax.Array) -> jax.Array:
    """What each token's choices came to, times their shares (float32), added up in float32, [S, D].

    The gradient is made in the order of the experts: for each choice of each token it would be float32, and lie in memory twice.
    """
    return (share_SK[..., None] * _choices(y_MD, here_SK, back_M)).sum(1).astype(y_MD.dtype)


def _to_tokens_backward(kept, dy_SD):
    y_MD, share_SK, here_SK, order_M, back_M = kept
    share_M1 = jnp.where(here_SK, share_SK, 0).reshape(-1, 1)[order_M]
    d_MD = (share_M1 * to_experts(dy_SD, here_SK, order_M, back_M)).astype(y_MD.dtype)
    dshare_SK = (_choices(y_MD, here_SK, back_M) * dy_SD[:, None].astype(jnp.float32)).sum(-1)
    return d_MD, dshare_SK, None, None, None


to_tokens.defvjp(lambda *given: (to_tokens(*given), given), _to_tokens_backward)


def _choices(y_MD: jax.Array, here_SK: jax.Array, back_M: jax.Array) -> jax.Array:
    """The rows in the order of the tokens and their choices, [S, K, D]; 0 for what another device has."""
    return jnp.where(here_SK[..., None], y_MD[back_M].reshape(*here_SK.shape, -1), 0)


def block_size(rows: int, experts: int) -> int:
    """Rows per piece of work: the largest power of two that is at most the mean number of rows per expert, and at most 1024.

    The pieces then hold at most twice the rows there are, and the time goes into multiplying, not into reading a kernel for each piece.
    """
    return min(1024, 1 << (max(1, rows // experts).bit_length() - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped(settings: tuple[int, str | None], x_MD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Row by row, x times the kernel of its expert, [M, F]; the first sizes[0] rows belong to expert 0, the next to expert 1, and so on.

    settings  (rows per piece of work, matmul precision)
    Rows past the last expert's hold anything, and their gradients too: the caller masks them, and gives finite numbers there.
    The work grows with the rows that have an expert. `jax.lax.ragged_dot` does that on TPU only, and there not for the gradient of the
    kernel; elsewhere it multiplies every row by every expert.
    """
    return _rows(settings, x_MD, kernel_EDF, sizes_E, 1)


def _forward(settings, x_MD, kernel_EDF, sizes_E):
    kernel, leaves = jax.tree.map(lambda leaf: leaf.value, kernel_EDF), jax.tree.leaves(kernel_EDF)
    learns = any(leaf.perturbed for leaf in leaves)
    return _rows(settings, x_MD.value, kernel, sizes_E.value, 1), (x_MD.value if learns else None, kernel, sizes_E.value)


def _backward(settings, kept, dy_MF):
    x_MD, kernel_EDF, sizes_E = kept
    dx_MD = _rows(settings, dy_MF, kernel_EDF, sizes_E, 2)
    if x_MD is None:  # the kernel does not learn
        return dx_MD, None, None
    return dx_MD, sequential_vmap(functools.partial(_kernels, settings))(x_MD, dy_MF, sizes_E), None


grouped.defvjp(_forward, _backward, symbolic_zeros=True)


def _rows(settings, x_MD, kernel_EDF, sizes_E, contract: int) -> jax.Array:
    """Each row times its expert's kernel, whose axis `contract` is summed over.

    Members of a group (training/many.py) take turns: `ragged_dot` cannot be mapped over rows alone, and a mapped loop copies its sums.
    """
    native, loops = (sequential_vmap(functools.partial(function, settings, contract)) for function in (rows_native, rows_loops))
    return jax.lax.platform_dependent(x_MD, kernel_EDF, sizes_E, tpu=native, default=loops)


def rows_native(settings, contract: int, x_MD, kernel_EDF, sizes_E) -> jax.Array:
    numbers = jax.lax.RaggedDotDimensionNumbers((([1], [contract]), ([], [])), [0], [0])
    return jax.lax.ragged_dot_general(x_MD, weight.value(kernel_EDF).astype(x_MD.dtype), sizes_E, numbers, precision=settings[1])


def rows_loops(settings, contract: int, x_MD, kernel_EDF, sizes_E) -> jax.Array:
    block, precision = settings

    def expert(y_MF, own):
        kernel, start, end = own
        kernel_DF = weight.value(kernel).astype(x_MD.dtype)

        def piece(at, inside, y_MF):
            x = jax.lax.dynamic_slice_in_dim(x_MD, at, block)
            y = jax.lax.dot_general(x, kernel_DF, (((1,), (contract - 1,)), ((), ())), precision=precision)
            before = jax.lax.dynamic_slice_in_dim(y_MF, at, block)
            return jax.lax.dynamic_update_slice_in_dim(y_MF, jnp.where(inside, y, before), at, 0)

        return _pieces(start, end, x_MD.shape[0], block, piece, y_MF), None

    y_MF = jnp.zeros((x_MD.shape[0], kernel_EDF.shape[3 - contract]), x_MD.dtype)
    return jax.lax.scan(expert, y_MF, (kernel_EDF, *_spans(sizes_E)))[0]


def _kernels(settings, x_MD, dy_MF, sizes_E) -> jax.Array:
    """For each expert, the transpose of its rows of x times its rows of dy, [E, D, F]; added up in float32."""
    block, precision = settings

    def expert(_, span):
        start, end = span

        def piece(at, inside, d_DF):
            x = jnp.where(inside, jax.lax.dynamic_slice_in_dim(x_MD, at, block), 0)
            dy = jax.lax.dynamic_slice_in_dim(dy_MF, at, block)
            numbers = (((0,), (0,)), ((), ()))
            return d_DF + jax.lax.dot_general(x, dy, numbers, precision=precision, preferred_element_type=jnp.float32)

        zero = jnp.zeros((x_MD.shape[1], dy_MF.shape[1]), jnp.float32)
        return None, _pieces(start, end, x_MD.shape[0], block, piece, zero).astype(x_MD.dtype)

    return jax.lax.scan(expert, None, _spans(sizes_E))[1]


def _spans(sizes_E) -> tuple[jax.Array, jax.Array]:
    """The first row of each expert, and the one after its last."""
    ends_E = jnp.cumsum(sizes_E)
    return ends_E - sizes_E, ends_E


def _pieces(start, end, rows: int, block: int, step, carry):
    """step(first row, which rows of the block are meant [block, 1], carry) for one block after another of the rows [start, end)."""

    def body(i, carry):
        begin = start + i * block
        at = jnp.minimum(begin, rows - block)  # the last block would reach past the end
        row = (at + jnp.arange(block))[:, None]
        return step(at, (row >= begin) & (row < end), carry)

    return jax.lax.fori_loop(0, -(-(end - start) // block), body, carry)
