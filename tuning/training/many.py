"""Many runs in one compiled program over one frozen base: the members of a group, each with its own tuned leaves and optimiser state.

The program is one run's train step, mapped over the members. Frozen leaves are not mapped: a projection of the base multiplies the rows of
all members at once. Where the copies of the base on a mesh divide the number of members, each copy has members of its own, and nothing but
measures passes between copies in a step; elsewhere every member's rows are split over the copies, as those of a run alone.

Each member's own loop (loop.steps) logs, evaluates, saves and stops as if it were alone; the loops take turns, and the first that asks for
a step has it made for all. A member that has ended keeps its place in the program, and nobody looks there any more.

Shapes: K members; "..." what the array of a run alone has.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.core.types import Batch, Mean, Means, TrainState, Tree
from tuning.data import loader
from tuning.data.loader import Loader
from tuning.training import loop
from tuning.training.guard import Guard, Interrupted
from tuning.training.loop import Job
from tuning.training.progress import Display

Numbers = Tree  # what members differ in: arrays [K, ...], in one member's step [...]
OWN: Any = TrainState(None, 0, None, 0)  # where the axis of the members is in a state: step and frozen leaves are everyone's


def train_step(
    make: Callable[[Numbers], Callable[[TrainState, Batch], tuple[TrainState, Means]]], split: PartitionSpec, where: Mesh
) -> Callable:  # fmt: skip
    """(numbers, state, batch) -> (state, means), all stacked, from `make`: the numbers of one member -> its train step."""
    each = lambda numbers, state, batch: make(numbers)(state, batch)  # noqa: E731
    return mapped(each, (0, OWN, 0), (OWN, 0), split, where)


def mapped(each: Callable, in_axes: Any, out_axes: Any, split: PartitionSpec, where: Mesh) -> Callable:
    """jax.vmap of `each` over members that are split so (`mesh.members`): every copy of the base has its own of them."""
    together = jax.vmap(each, in_axes=in_axes, out_axes=out_axes)
    if not (axes := set(meshes.names(split))):
        return together
    if all(size == 1 for axis, size in where.shape.items() if axis not in axes):  # a copy is one device, whose part needs no mesh
        axes = set(where.axis_names)
    specs = lambda of: jax.tree.map(lambda axis: PartitionSpec() if axis is None else split, of, is_leaf=lambda x: x is None)  # noqa: E731
    return jax.shard_map(together, mesh=where, in_specs=specs(in_axes), out_specs=specs(out_axes), axis_names=axes, check_vma=False)


def compiled(step: Callable, numbers: Numbers, state: TrainState, batch: Batch) -> Callable[[TrainState, Batch], tuple[TrainState, Means]]:
    """The train step compiled for these, the state donated and kept where it is, the measures on every device."""
    places = jax.tree.map(lambda x: x.sharding, state)
    shardings = places, meshes.replicated(state.step.sharding.mesh)  # pyright: ignore[reportAttributeAccessIssue]
    program = jax.jit(step, donate_argnums=1, out_shardings=shardings).lower(numbers, state, batch).compile()
    return functools.partial(program, numbers)


def layout(members: Sequence[Tree]) -> Tree:
    """Shape, dtype and sharding of the stacked leaves [K, ...], from the members' own: every axis is as long as the longest."""

    def leaf(*own):
        shape = (len(own), *map(max, zip(*(x.shape for x in own), strict=True)))
        place = own[0].sharding
        split = PartitionSpec(*meshes.members(len(own), place.mesh), *place.spec)
        return jax.ShapeDtypeStruct(shape, own[0].dtype, sharding=NamedSharding(place.mesh, split))

    return jax.tree.map(leaf, *members)


def stack(members: Sequence[Tree], like: Tree) -> Tree:
    """The members' leaves in one tree of this layout, with zeros where a member's own are shorter."""

    def leaf(like, *own):
        whole = np.zeros(like.shape, like.dtype)
        for k, x in enumerate(own):
            whole[(k, *map(slice, x.shape))] = meshes.gather(x)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: whole[index])

    return jax.tree.map(leaf, like, *members)


@functools.lru_cache(maxsize=8)
def _taking(leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Callable[[list[jax.Array], int], list[jax.Array]]:
    """(stacked leaves, member) -> the member's own, of these shapes."""
    take = lambda stacked, k: [x[k][tuple(map(slice, like.shape))] for x, like in zip(stacked, leaves, strict=True)]  # noqa: E731
    return jax.jit(take, out_shardings=[like.sharding for like in leaves])


def batches(rows: Any, members: Sequence[Loader], mesh: Mesh) -> Generator[Batch]:
    """The members' batches from where they stand, stacked. Their positions do not move: see `Turns`."""
    start = members[0].position()["step"]
    make = lambda step: loader.place(rows, np.stack([member.indices(step) for member in members]), mesh)  # noqa: E731
    return loader.prefetch(make, itertools.count(start))


class Turns:
    """A member's place in its data. The batches themselves come stacked."""

    def __init__(self, data: Loader):
        self._data = data
        self.position = data.position

    def __iter__(self) -> Generator[Any]:
        while True:
            self._data.seek({"step": self._data.position()["step"] + 1})
            yield None


class Stacked:
    """The measures of a step, fetched at once when the first member asks for them."""

    def __init__(self, means: Means):
        self._means = means

    @functools.cached_property
    def host(self) -> dict[str, Mean]:
        return jax.device_get(dict(self._means))


class Measures(Mapping[str, Mean]):
    """One member's share of them."""

    def __init__(self, stacked: Stacked, member: int):
        self._stacked, self._member = stacked, member

    def __getitem__(self, name: str) -> Mean:
        mean = self._stacked.host[name]
        return Mean(mean.total[self._member], mean.weight[self._member])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stacked.host)

    def __len__(self) -> int:
        return len(self._stacked.host)


class Group:
    """The state of all members, and what is done to all of them at once.

    program   (state, batch) -> (state, means), stacked
    state     stacked
    own       (tuned, optimizer) of each member as ShapeDtypeStructs: what its checkpoint holds
    judge     state -> each member's measures; None without evaluation data
    """

    def __init__(
        self, program: Callable, state: TrainState, batches: Iterator[Batch], own: Sequence[tuple[Tree, Any]],
        judge: Callable[[TrainState], list[dict[str, float]]] | None,
    ):  # fmt: skip
        self.state, self.at, self.broken = state, int(state.step), False
        self._program, self._batches, self._own, self._judge = program, batches, own, judge
        self._means, self._judged = Stacked({}), (-1, [])

    def step(self, member: Member, batch: Any) -> tuple[Member, Means]:
        """The member's next step. Whoever asks first has it made for all."""
        if member.step == self.at:
            self.broken = True
            self.state, means = self._program(self.state, next(self._batches))
            self.at, self._means, self.broken = self.at + 1, Stacked(means), False
        return Member(self, member.number, self.at), Measures(self._means, member.number)

    def evaluate(self, member: Member) -> dict[str, float]:
        """The member's measures on the evaluation data. Whoever asks first has them made for all."""
        self.check(member)
        if self._judged[0] != self.at:
            assert self._judge is not None
            self.broken = True
            self._judged, self.broken = (self.at, self._judge(self.state)), False
        return self._judged[1][member.number]

    def check(self, member: Member) -> None:
        if member.step != self.at:
            raise RuntimeError(f"A member's state of step {member.step} is asked for, and the group is at step {self.at}.")

    def take(self, number: int) -> tuple[Tree, Any]:
        """A member's own (tuned, optimizer), as if it were alone."""
        leaves, structure = jax.tree.flatten(self._own[number])
        return structure.unflatten(_taking(tuple(leaves))(jax.tree.leaves((self.state.tuned, self.state.optimizer)), number))


class Member:
    """A member's state at a step, as its loop sees it; its leaves can be read until the group makes the next step."""

    def __init__(self, group: Group, number: int, step: int):
        self._group, self.number, self.step = group, number, step

    @functools.cached_property
    def _own(self) -> tuple[Tree, Any]:
        self._group.check(self)
        return self._group.take(self.number)

    @property
    def tuned(self) -> Tree:
        return self._own[0]

    @property
    def optimizer(self) -> Any:
        return self._own[1]

    @property
    def frozen(self) -> Tree:
        return self._group.state.frozen


Outcome = dict[str, float] | Exception  # a run's final measures, or what ended it


def run(jobs: Sequence[Job], group: Group, memories: Sequence[dict[str, Any] | None], display: Display) -> list[Outcome]:
    """Trains all members; returns the final values of each, or what ended it: that ends no other member.

    `jobs` have the group's `step` and, if there is evaluation data, `evaluate`. Raises what `loop.run` raises after a signal, once every
    member has saved, and what goes wrong with the program that they share.
    """
    ended: dict[int, Any] = {}
    interrupted: Interrupted | None = None
    with Guard() as guard, display:
        stops = functools.lru_cache(maxsize=1)(guard.stops)  # one answer to all of them
        going = {k: loop.steps(jobs[k], Member(group, k, group.at), memories[k], stops) for k in range(len(jobs))}  # pyright: ignore
        while going:
            for k, course in list(going.items()):
                try:
                    next(course)
                    continue
                except StopIteration as done:
                    ended[k] = done.value[1]
                except Interrupted as error:
                    interrupted = error
                except Exception as error:
                    if group.broken:
                        raise
                    jobs[k].display.say(f"Ended: {error}")
                    ended[k] = error
                del going[k]
    if interrupted:
        raise interrupted
    return [ended[k] for k in range(len(jobs))]


def gained(apply: Callable, gains: Mapping[str, jax.Array]) -> Callable:
    """The forward pass with some leaves multiplied first, so that one program serves members of different scales."""

    def run(params: Tree, *inputs: Any) -> Any:
        scaled = lambda name, x: x * jnp.asarray(gains[name], x.dtype) if name in gains else x  # noqa: E731
        return apply(tree.map_named(scaled, params), *inputs)

    return run
