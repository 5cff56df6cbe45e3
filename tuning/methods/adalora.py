"""AdaLoRA: low-rank updates that share one budget of rank, dealt out by importance (Zhang et al., 2023, arXiv:2303.10512).

The change of a kernel is A diag(e) B, with A and B held near orthogonal, so that the entries of e are like singular values. Of all
entries in all layers, the least important ones are zeroed again and again while the budget shrinks, and for good once it is reached. What
happens at which update is what PEFT does when it is told the updates made before.

Shapes: L layers of a segment, D input width, F output width, R initial rank, "..." any leading axes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tuning.core import tree
from tuning.core.types import Tree
from tuning.methods import kernels
from tuning.methods.kernels import Leaves
from tuning.methods.method import Method, Wrap, added
from tuning.nn.dropout import dropout as drop
from tuning.nn.sites import Outline, Project, Site, along_last
from tuning.nn.weight import matmul


class Triplets(nnx.Module):
    """x W + b + scale * ((dropout(x) A) * e) B. e starts at zero, so that the network starts at its base."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, rngs: nnx.Rngs):
        (D, F), (into, out) = site.shape, site.axes
        self.a = nnx.Param(0.02 * jax.random.normal(rngs.params(), (D, rank)), out_sharding=(into, "rank"))
        self.e = nnx.Param(jnp.zeros(rank), out_sharding=("rank",))
        self.b = nnx.Param(0.02 * jax.random.normal(rngs.params(), (rank, F)), out_sharding=("rank", out))
        self.scale, self.dropout = scale, dropout

    def __call__(self, x: jax.Array, project: Project, key: jax.Array | None) -> jax.Array:
        z = matmul(drop(x, self.dropout, key), self.a[...])
        return project(x) + matmul(z * along_last(self.e[...] * self.scale, z), self.b[...])


def penalty(weight: float, tuned: Tree) -> jax.Array:
    """`weight` times the mean, over all A and B in all layers, of the Frobenius norm of A'A - 1 or B B' - 1."""
    norms = []
    with jax.default_matmul_precision("highest"):
        for _, _, own in kernels.adapters(tree.flatten(tuned)):
            a, b = (own[name].astype(jnp.float32) for name in "ab")
            for gram in (jnp.swapaxes(a, -1, -2) @ a, b @ jnp.swapaxes(b, -1, -2)):
                one = jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape)
                norms.append(optax.safe_norm(gram - one, 0.0, axis=(-2, -1)).ravel())
    return weight * jnp.concatenate(norms).mean()


class Allocation(NamedTuple):
    """The state of an optimizer that a budget stands around.

    count        updates made
    sensitivity  moving average of |leaf * gradient| of every a, e and b, float32
    uncertainty  moving average of how far that is from its average
    inner        the optimizer's own
    """

    count: jax.Array
    sensitivity: Tree
    uncertainty: Tree
    inner: Any


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many entries of e are zeroed, and when; the fields are the keys of `adalora`."""

    init_rank: int
    target_rank: int
    warmup_steps: int | None
    final_steps: int | None
    every: int
    beta1: float
    beta2: float

    def zeroed(self, steps: int, entries: int) -> list[int]:
        """How many of so many entries are zeroed at each update, up to the one that reaches the target; ValueError if none shrinks it."""
        warmup = steps // 10 if self.warmup_steps is None else self.warmup_steps
        final = max(1, steps // 3) if self.final_steps is None else self.final_steps
        last = steps - final
        if warmup >= last:
            raise ValueError(
                f"method.warmup_steps={warmup} and method.final_steps={final} leave no update to shrink the budget in: "
                f"train.steps={steps}. Lower them, or raise train.steps."
            )
        least = entries // self.init_rank * self.target_rank
        # In Python, as PEFT has it: how a float is rounded decides about its whole part.
        kept = [int((entries - least) * (1 - (i - warmup) / (last - warmup)) ** 3 + least) for i in range(last + 1)]
        return [entries - n if i > warmup and (i == last or i % self.every == 0) else 0 for i, n in enumerate(kept)]

    def around(self, steps: int) -> Wrap:
        """What goes around the optimizer in a run of so many steps."""
        self.zeroed(steps, self.init_rank)
        return functools.partial(allocated, self, steps)


def allocated(budget: Budget, steps: int, transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation, after each of whose updates the averages are renewed and entries are zeroed.

    From the last allocation on, the averages stand still, and so does what they zero.
    """

    def init(params: Any) -> Allocation:
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree.split(params, added)[0])  # noqa: E731
        return Allocation(jnp.zeros((), jnp.int32), zeros(), zeros(), transform.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Tree, Allocation]:
        gradients = tree.flatten(updates)
        updates, inner = transform.update(updates, state.inner, params)
        moved: Any = optax.apply_updates(params, updates)
        leaves, moves, moved = map(tree.flatten, (params, updates, moved))
        means, gaps = tree.flatten(state.sensitivity), tree.flatten(state.uncertainty)
        zeroed = jnp.asarray(budget.zeroed(steps, sum(x.size for name, x in means.items() if name.endswith("/e"))), jnp.int32)
        last = zeroed.size - 1
        renewed = lambda beta, old, new: jnp.where(state.count < last, beta * old + (1 - beta) * new, old)  # noqa: E731
        for name in means:
            now = jnp.abs(moved[name].astype(jnp.float32) * gradients[name].astype(jnp.float32))
            means[name] = renewed(budget.beta1, means[name], now)
            gaps[name] = renewed(budget.beta2, gaps[name], jnp.abs(now - means[name]))
        scores = importance({name: mean * gaps[name] for name, mean in means.items()})
        worst = lowest(scores, zeroed[jnp.minimum(state.count, last)])
        moves |= {name: jnp.where(score <= worst, -leaves[name], moves[name]) for name, score in scores.items()}
        return tree.unflatten(moves), Allocation(state.count + 1, tree.unflatten(means), tree.unflatten(gaps), inner)

    return optax.GradientTransformation(init, update)


def importance(scores: Leaves) -> Leaves:
    """{name of e: [..., R]} from the scores of single numbers: an entry's own, and the means of those of its column of A and row of B."""
    found = {place: own["e"] + (own["a"].mean(-2) + own["b"].mean(-1)) for place, _, own in kernels.adapters(scores)}
    return {f"{place}/adapter/e": score for place, score in found.items()}


def lowest(scores: Leaves, count: jax.Array) -> jax.Array:
    """The largest of the `count` lowest scores, which are at least 0; -1 if there are none."""
    ordered = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
    return jnp.where(count > 0, ordered[jnp.maximum(count, 1) - 1], -1.0)


def adalora(
    outline: Outline,
    *,
    init_rank: int = 12,
    target_rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("all",),
    warmup_steps: int | None = None,
    final_steps: int | None = None,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonal: float = 0.5,
) -> Method:
    """Low-rank updates at the sites that `targets` name (as LoRA's do), scaled by alpha / init_rank, whose ranks follow from training.

    Every site starts with init_rank singular values; on average target_rank are left. Half as many again to start with, and 0.85, are the
    paper's; `every` and `orthogonal` are PEFT's.

    warmup_steps  updates before the budget begins to shrink; None is a tenth of the run
    final_steps   updates at the end after which values that are zero stay so; None is a third of the run. In between, the budget falls
                  with the cube of the share of updates that are left
    every         updates between allocations; between two of them, a value that was zeroed learns again
    beta1, beta2  of the moving averages of a number's sensitivity, |number * gradient|, and of its uncertainty; the product is importance
    orthogonal    weight of the penalty that holds A and B near orthogonal
    """
    if not 1 <= target_rank < init_rank:
        raise ValueError(
            f"method.target_rank={target_rank} must be at least 1 and less than method.init_rank={init_rank}; lora prunes nothing."
        )
    kernels.check(rank=init_rank, alpha=alpha, dropout=dropout)
    if every < 1 or (warmup_steps or 0) < 0 or (final_steps is not None and final_steps < 1):
        counts = f"method.every={every}, method.warmup_steps={warmup_steps}, method.final_steps={final_steps}"
        raise ValueError(f"{counts}: the first and the last are at least 1, and no number of updates is negative.")
    if not (0 < beta1 < 1 and 0 < beta2 < 1):
        raise ValueError(f"method.beta1={beta1} and method.beta2={beta2}: the decay of a moving average lies between 0 and 1.")
    if not 0 <= orthogonal < math.inf:
        raise ValueError(f"method.orthogonal={orthogonal}: the weight of a penalty is not negative.")
    scale = alpha / (init_rank + 1e-5)  # as PEFT has it

    def adapted(role: str, kernel_LDF: jax.Array, own: Leaves) -> jax.Array:
        return kernel_LDF + scale * (own["a"] * own["e"][..., None, :]) @ own["b"]

    return Method(
        tuned=added,
        sites=kernels.answered(kernels.chosen(outline, targets), lambda site, rngs: Triplets(site, init_rank, scale, dropout, rngs)),
        fold=functools.partial(kernels.fold, adapted=adapted),
        penalty=functools.partial(penalty, orthogonal) if orthogonal else None,
        gain=lambda name: scale if name.endswith("/adapter/e") else 1.0,
        loose=("alpha",),
        around=Budget(init_rank, target_rank, warmup_steps, final_steps, every, beta1, beta2).around,
    )
