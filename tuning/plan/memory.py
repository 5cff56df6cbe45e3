"""What a train step takes of a device's memory, by component, without compiling it.

The state is exact: the layout says what each device holds. Temporaries are those of the traced step, of one microbatch on one device: its
rows, its parts of heads, feed-forward layers and vocabulary, and whole what it gathers of the weights; see liveness.py for the model of
what then lies in memory, and experiments/pod_compilation for how far compilers are from it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as P

from tuning import build
from tuning.core import chips, tree
from tuning.core import config as configs
from tuning.core import mesh as meshes
from tuning.core.types import Tree
from tuning.data import loader
from tuning.nn import stack
from tuning.nn.quantised import Quantised
from tuning.plan import liveness
from tuning.training import state

AHEAD, AHEAD_ADDED = 0.25, 0.85  # of what the other layers of a turn gather, that is there too; and of what they add up (see _adds)
WINDOWED, FEW = 0.75, 16  # of a layer's gathered weights what is there on a TPU, where no more than so many devices share them
TILE = 16  # rows of two bytes that a TPU keeps together
SPLIT = ("heads", "kv_heads", "hidden", "expert_hidden", "vocab_size")  # fields of a config, by the axis tensor


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    weights      what does not learn
    masters      what learns
    gradients    of what learns; twice where an update has several microbatches
    optimizer    its state
    activations  what the layers keep for the backward pass, by the rematerialisation policy
    logits       of the chunk whose loss is computed at a time, and their gradient
    batch        of an update
    cache        of generation at evaluations (eval.prompts), which is not there during a step: it does not count in the total
    temporaries  what else the compiler makes: gathered weights, a layer's inside, the head
    """

    weights: int
    masters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    batch: int
    cache: int
    temporaries: int

    @property
    def arguments(self) -> int:
        """What is there before a step and after it."""
        return self.weights + self.masters + self.optimizer + self.batch

    @property
    def total(self) -> int:
        return self.arguments + self.gradients + self.activations + self.logits + self.temporaries


def estimate(parts: build.Parts, peak: liveness.Peak | None = None) -> Memory:
    """The memory of a run's train step on a device of its mesh. `peak`, where it is known: of a run that gives a device the same work."""
    m, settings = parts.model, parts.settings
    start = state.abstract(m.layout, m.tuned, parts.optimizer.transform, m.mesh)
    gradients = on_device(start.tuned)
    peak = temporaries(parts) if peak is None else peak
    copies = 2 if settings.accumulate > 1 else 1
    activations, logits = min(peak.kept, peak.bytes), min(_logits(parts), peak.bytes)
    rest = max(0, peak.bytes - activations - logits) + _cast(parts) + _turned(parts)
    return Memory(
        on_device(start.frozen), gradients, copies * gradients, on_device(start.optimizer), activations, logits,
        on_device(loader.abstract(parts.train, settings.batch_size, m.mesh)), _cache(parts), rest,
    )  # fmt: skip


def on_device(leaves: Tree) -> int:
    """Bytes that one device holds of arrays in their shards."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(leaves))


def temporaries(parts: build.Parts) -> liveness.Peak:
    """What computing the gradients of one microbatch takes on one device, besides its arguments and the gradients."""
    m = parts.model
    tuned, _ = tree.split(m.layout, m.tuned)
    results = [on_device(leaf) for leaf in jax.tree.leaves(tuned)]
    traced, names = _traced(parts)
    own, turned = habits(parts), _tables(parts)
    beside = ["head/kernel"] if _adds(parts) and not m.tuned("head/kernel") else []  # what is added up lies beside the sum

    def held(i: int) -> float:
        if i >= len(names) or stack.layer_range(names[i]) is not None:
            return 0.0
        return 1.0 if names[i] in turned else own.slices * (2 if names[i] in beside else 1)

    # What the head's gradient sums up to over devices is asked for at the end, and stays whole until then.
    late = own.slices > 0 and parts.settings.accumulate == 1

    def result(i: int, size: int) -> float:
        return results[i] if i < len(results) and not (late and names[i] == "head/kernel") else size

    found = liveness.peak(traced, own, held, result)
    return dataclasses.replace(found, bytes=max(0, found.bytes - sum(results)))


def habits(parts: build.Parts) -> liveness.Habits:
    """What compilers for the run's devices do with weights that fsdp splits. Those for TPUs, where few devices share a matrix, multiply by
    some of them shard by shard, as they come, and never have the whole."""
    copies, mesh = gathered(parts), parts.model.mesh
    windowed = meshes.device(mesh).platform == "tpu" and mesh.shape["fsdp"] <= FEW
    return liveness.Habits(copies, WINDOWED if windowed else 1.0, copies * _ahead(parts))


def gathered(parts: build.Parts) -> float:
    """How often a weight that fsdp splits is there where it is used: 0.0 if none is split, else once; twice where its shards are no whole
    tiles of a TPU, as it is put together in another place then, but not where it is added up."""
    split, config, where = parts.model.mesh.shape["fsdp"], parts.model.source.config, meshes.device(parts.model.mesh)
    if split == 1:
        return 0.0
    apart = getattr(getattr(config, "decoder", config), "width", 0) // split % TILE
    return 2.0 if apart and where.platform == "tpu" and not _adds(parts) else 1.0


def _adds(parts: build.Parts) -> bool:
    """Whether weights that fsdp splits are gathered by an all-reduce of copies that are zero but for a device's own shard."""
    return chips.of(meshes.device(parts.model.mesh).device_kind) is chips.CHIPS["v5p"]


def _traced(parts: build.Parts) -> tuple[Any, list[str]]:
    """(jaxpr of the gradients on one device, names of the parameters among its inputs, which come first)."""
    m, mesh = parts.model, parts.model.mesh
    form, _ = build.attention(m.source, m.method, mesh, parts.train.length)
    # Kernels of different devices keep the same: a TPU's stands for those of others, which cannot be traced without the device.
    source = dataclasses.replace(
        m.source, config=sharded(m.source.config, dict(mesh.shape)), attention="blockwise" if form == "blockwise" else "auto"
    )
    alone = meshes.over(meshes.Absent(1, AbstractDevice("", None, "tpu")))
    method = configs.bind(build.SECTIONS, parts.config, "method")(build.outline(source))
    own = build.model(source, method, alone)
    rows = parts.settings.batch_size // parts.settings.accumulate // meshes.row_count(mesh)
    batch = loader.abstract(parts.train, rows, alone)
    base = None if parts.base is None else build.base(own)

    def gradients(tuned, frozen, batch):
        def total(tuned):
            forward = lambda piece: own.network.apply(tree.merge(tuned, frozen), piece, None)  # noqa: E731
            before = None if base is None else functools.partial(base, frozen)
            return parts.loss(forward, batch, before)["loss"].total

        return jax.grad(total)(tuned)

    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, x.shape[1] // mesh.shape["context"]), x.dtype), batch)
    bare = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), x) for x in (*tree.split(own.layout, own.tuned), batch)]
    if (split := mesh.shape["expert"]) > 1:  # one device's part of what the axis of the experts exchanges
        across = lambda x: P(*(axis if axis == "expert" else None for axis in x.sharding.spec))  # noqa: E731
        places = [jax.tree.map(across, leaves) for leaves in tree.split(m.layout, m.tuned)]
        gradients = jax.shard_map(
            gradients, mesh=AbstractMesh((split,), ("expert",)), in_specs=(*places, P()), out_specs=places[0], check_vma=False
        )
    paths = [jax.tree_util.tree_flatten_with_path(leaves)[0] for leaves in bare[:2]]
    names = ["/".join(str(key.key) for key in path if hasattr(key, "key")) for leaves in paths for path, _ in leaves]
    return jax.make_jaxpr(gradients)(*bare).jaxpr, names


def sharded(config: Any, sizes: dict[str, int]) -> Any:
    """The config of the part of a network that one device of a mesh has. What does not divide stays whole, as by the rules of the mesh."""
    if hasattr(config, "decoder"):
        return dataclasses.replace(config, encoder=sharded(config.encoder, sizes), decoder=sharded(config.decoder, sizes))
    fields = {field.name for field in dataclasses.fields(config)}
    changed = {}
    for name in fields.intersection(SPLIT):
        size = getattr(config, name)
        changed[name] = size // sizes["tensor"] if size % sizes["tensor"] == 0 else size
    if "kv_heads" in changed and changed["heads"] % changed["kv_heads"]:
        changed["kv_heads"] = changed["heads"]
    if "scale" in fields:
        changed["scale"] = config.scale or config.head_dim**-0.5
    return dataclasses.replace(config, **changed)


def _cast(parts: build.Parts) -> int:
    """What learns in layers, in the dtype of the computation: compilers cast whole stacks before the loop over layers."""
    m = parts.model
    dtype = jnp.dtype(m.source.config.dtype)
    learns = [x for n, x in tree.flatten(m.layout).items() if m.tuned(n) and stack.layer_range(n) and x.dtype != dtype]
    return sum(on_device(x) * dtype.itemsize // x.dtype.itemsize for x in learns)


def _turned(parts: build.Parts) -> int:
    """What is there a second time: before a loop, compilers turn over what it would gather from many places.

    Those for GPUs do so with weights that fsdp splits along their last axis; those for TPUs with experts whose rows are split and then no
    whole lanes (one after the other, unless microbatches need all of them), and with codes that fsdp splits along the inputs.
    """
    m = parts.model
    leaves = {n: x for n, x in tree.flatten(m.layout).items() if not m.tuned(n)}
    codes = [x.codes for x in leaves.values() if isinstance(x, Quantised)]
    last = [x for x in leaves.values() if not isinstance(x, Quantised) and _axes(x, len(x.shape) - 1)]
    if meshes.device(m.mesh).platform == "gpu":
        return sum(on_device(x) for x in last if "fsdp" in _axes(x, len(x.shape) - 1))
    narrow = [_filled(x) for x in last if len(x.shape) == 4 and x.sharding.shard_shape(x.shape)[-1] % liveness.LANES]
    experts = sum(narrow) if parts.settings.accumulate > 1 else max(narrow, default=0)
    return experts + sum(on_device(x) for x in codes if len(x.shape) == 4 and "fsdp" in _axes(x, 1))


def _filled(leaf: Any) -> int:
    """Bytes of a device's shard whose rows are filled up to whole lanes."""
    *most, last = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(most) * -(-last // liveness.LANES) * liveness.LANES * leaf.dtype.itemsize


def _tables(parts: build.Parts) -> list[str]:
    """The embedding, if the head is made of it, and it neither learns nor is gathered: it is turned over for the head."""
    m = parts.model
    names = tree.flatten(m.layout)
    tied = m.source.config.head.output == "vocabulary" and "head/kernel" not in names and m.mesh.shape["fsdp"] == 1
    return [name for name in names if tied and name.endswith("embed/table") and not m.tuned(name)]


def _axes(leaf: Any, axis: int) -> tuple[str, ...]:
    """The axes of the mesh that split an array's axis."""
    spec = leaf.sharding.spec
    names = spec[axis] if 0 <= axis < len(spec) else None
    return names if isinstance(names, tuple) else (names,) if names else ()


def _ahead(parts: build.Parts) -> int:
    """Weights that are gathered before their turn, where one turn of the loop is several layers."""
    m = parts.model
    spans = {n: (x, span) for n, x in tree.flatten(m.layout).items() if (span := stack.layer_range(n)) and span.step > 1}
    if not spans:
        return 0
    dtype, tensor = jnp.dtype(m.source.config.dtype), m.mesh.shape["tensor"]
    one_turn = sum(math.prod(x.shape) // len(span) for x, span in spans.values()) * dtype.itemsize // tensor
    return int((AHEAD_ADDED if _adds(parts) else AHEAD) * one_turn * (1 - 1 / max(span.step for _, span in spans.values())))


def _logits(parts: build.Parts) -> int:
    """Two float32 arrays of a chunk's logits: themselves and their gradient."""
    config, rows = parts.model.source.config, parts.settings.batch_size // parts.settings.accumulate
    if config.head.output != "vocabulary":
        return 0
    own = sharded(config, dict(parts.model.mesh.shape))
    chunk = min(parts.config["objective"].get("chunk", parts.train.length), -(-parts.train.length // 2))
    return 2 * 4 * rows // meshes.row_count(parts.model.mesh) * chunk * own.vocab_size


def _cache(parts: build.Parts) -> int:
    """Keys and values of all prompts that an evaluation continues."""
    prompts, config = parts.evaluation.prompts, parts.model.source.config
    if not prompts or not hasattr(config, "kv_heads"):
        return 0
    slots = parts.train.length + parts.evaluation.max_new_tokens
    return 2 * len(prompts) * config.layers * slots * config.kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
