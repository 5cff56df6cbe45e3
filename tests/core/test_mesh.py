"""Meshes and where arrays live on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tuning.core import mesh


def test_one_axis_may_take_the_devices_that_are_left():
    assert dict(mesh.mesh(data=-1, tensor=2).shape)["data"] == 4
    assert mesh.row_count(mesh.mesh(data=2, fsdp=2, tensor=2)) == 4
    assert mesh.row_count(mesh.mesh(data=2, expert=2, tensor=2)) == 4


def test_a_mesh_that_does_not_fit_says_what_there_is():
    with pytest.raises(ValueError, match=r"Mesh \{'data': 16\} needs 16 devices; there are 8.*config\.mesh\.data=-1"):
        mesh.mesh(data=16)
    with pytest.raises(ValueError, match="multiple of 3"):
        mesh.mesh(fsdp=3)
    with pytest.raises(ValueError, match="at most one"):
        mesh.mesh(data=-1, fsdp=-1)


def test_an_axis_that_does_not_divide_stays_whole():
    where = mesh.mesh(data=1, fsdp=4, tensor=2)
    assert mesh.spec((64, 32), ("vocab", "embed"), where) == P("tensor", "fsdp")
    assert mesh.spec((331, 32), ("vocab", "embed"), where) == P(None, "fsdp")
    assert mesh.spec((8, 5), ("batch", None), mesh.mesh(data=2, fsdp=4)) == P(("data", "fsdp"), None)


def test_the_expert_axis_splits_experts_and_rows():
    where = mesh.mesh(data=1, fsdp=2, expert=4)
    assert mesh.spec((8, 32, 16), ("experts", "embed", "mlp"), where) == P("expert", "fsdp", None)
    assert mesh.spec((6, 32, 16), ("experts", "embed", "mlp"), where) == P(None, "fsdp", None)
    assert mesh.spec((8, 5), ("batch", None), where) == P(("fsdp", "expert"), None)
    assert mesh.rows(where).spec == P(("dcn", "data", "fsdp", "expert"))


def test_the_context_axis_splits_sequences():
    where = mesh.mesh(data=1, fsdp=2, context=4)
    assert mesh.spec((8, 12, 5), ("batch", "sequence", None), where) == P("fsdp", "context", None)
    assert mesh.spec((8, 6), ("batch", "sequence"), where) == P("fsdp", None)
    assert mesh.row_count(where) == 2 and mesh.names(P(("data", "fsdp"), None, "context")) == ("data", "fsdp", "context")
    with jax.set_mesh(where):
        assert [mesh.pieces(size, "sequence") for size in (12, 6)] == [4, 1]
    assert mesh.pieces(12, "sequence") == 1


@dataclasses.dataclass(frozen=True)
class Chip:
    """What jax's ordering asks of a TPU chip: 2 slices of 2 x 2."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def test_the_dcn_axis_goes_over_slices_and_no_other_axis_does():
    chips = [Chip(4 * s + i, s, (i % 2, i // 2, 0)) for i in range(4) for s in range(2)]
    where = mesh.over(chips, dcn=2, fsdp=2, tensor=2)
    assert dict(where.shape) == dict(dcn=2, data=1, fsdp=2, expert=1, context=1, tensor=2)
    assert [{chip.slice_index for chip in part.flat} for part in where.devices] == [{0}, {1}]
    assert mesh.rows(where).spec[0][0] == "dcn"
    with pytest.raises(ValueError, match=r"mesh\.dcn=1, and the devices are 2 slices.*Set it to 2"):
        mesh.over(chips, fsdp=8)


def test_a_logical_axis_without_a_rule_is_an_error():
    with pytest.raises(KeyError):
        mesh.spec((4,), ("embbed",), mesh.mesh())


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "expert": 4}, {"data": 1, "tensor": 8},
        {"dcn": 2, "data": 2, "context": 2}, {"data": 1, "fsdp": 2, "context": 4},
    ],
)  # fmt: skip
def test_sums_by_rows_are_the_sums_over_all_rows(sizes):
    x = jnp.arange(96.0).reshape(8, 4, 3)
    w = jnp.arange(3.0)

    def weighted(w, x):
        y = x * w[None, None]
        return y.sum((0, 1)), y

    with jax.set_mesh(mesh.mesh(**sizes)):
        total, rows = jax.jit(lambda w, x: mesh.by_rows(lambda w, x: (weighted(w, x)[0], weighted(w, x)[1]))(w, x))(w, x)
    np.testing.assert_array_equal(total, weighted(w, x)[0])
    np.testing.assert_array_equal(rows, weighted(w, x)[1])
