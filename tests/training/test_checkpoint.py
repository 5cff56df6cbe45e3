"""Checkpoints: what comes back, what is kept, what a failure leaves behind, and what a flipped bit does."""

import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tuning.core import mesh, tree
from tuning.training.checkpoint import Checkpoints

P = PartitionSpec


def state(seed: int, sharding=None):
    """A tuned tree and an optax state with named tuples, tuples, dicts and bare counters in it."""
    keys = jax.random.split(jax.random.key(seed), 2)
    tuned = {
        "blocks": {"0-15": {"attn": {"q": {"kernel": jax.random.normal(keys[0], (2, 8, 16))}}}},
        "norm": {"scale": jax.random.normal(keys[1], (8,)).astype(jnp.bfloat16)},
    }
    if sharding is not None:
        tuned = jax.tree.map(lambda x: jax.device_put(x, sharding), tuned)
    optimizer = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(tuned)
    return tuned, jax.tree.map(lambda x: x + seed, optimizer)


def abstract(value, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), value)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64)), a, b)


@pytest.fixture
def opened(tmp_path):
    """Opens checkpoints, and closes them at the end."""
    made = []

    def open_(directory=tmp_path, **options):
        made.append(Checkpoints(directory, **options))
        return made[-1]

    yield open_
    for checkpoints in made:
        checkpoints.close()


def saved(checkpoints, *steps, metrics=()):
    for step, metric in zip(steps, metrics or [None] * len(steps), strict=True):
        tuned, optimizer = state(step)
        checkpoints.save(step, tuned, optimizer, {"seen": step * 10}, metric)
    checkpoints.wait()
    return checkpoints


def template():
    tuned, optimizer = state(0)
    return abstract(tuned), abstract(optimizer)


def test_what_is_restored_is_what_was_saved(opened):
    checkpoints = opened()
    tuned, optimizer = state(3)
    checkpoints.save(3, tuned, optimizer, {"position": {"epoch": 1, "row": 7}, "ratio": 0.1}, metric=2.5)
    checkpoints.wait()
    step, tuned_back, optimizer_back, meta = opened(checkpoints.directory).restore("last", abstract(tuned), abstract(optimizer))
    assert (step, meta) == (3, {"position": {"epoch": 1, "row": 7}, "ratio": 0.1})
    same((tuned_back, optimizer_back), (tuned, optimizer))
    assert jax.tree.map(lambda x: x.dtype, tuned_back) == jax.tree.map(lambda x: x.dtype, tuned)


def test_the_tuned_leaves_alone_can_be_restored_and_the_optimizer_is_not_even_opened(opened):
    checkpoints = saved(opened(), 1)
    shutil.rmtree(checkpoints.directory / "1" / "optimizer")
    _, tuned, optimizer, meta = opened(checkpoints.directory, read_only=True).restore("last", template()[0])
    same(tuned, state(1)[0])
    assert optimizer is None and meta == {"seen": 10}


def test_a_state_is_restored_on_another_mesh_and_in_another_dtype(opened):
    eight = mesh.over(jax.devices(), fsdp=8)
    tuned, optimizer = state(5, NamedSharding(eight, P()))
    kernel = ("blocks", "0-15", "attn", "q", "kernel")
    tuned["blocks"]["0-15"]["attn"]["q"]["kernel"] = jax.device_put(
        tree.flatten(tuned)["/".join(kernel)], NamedSharding(eight, P(None, "fsdp"))
    )
    checkpoints = opened()
    checkpoints.save(5, tuned, optimizer, {})
    two = NamedSharding(mesh.over(jax.devices()[2:4], tensor=2), P(None, "tensor"))
    flat = {
        n: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=two if x.ndim == 3 else NamedSharding(two.mesh, P()))
        for n, x in tree.flatten(tuned).items()
    }
    _, back, _, _ = checkpoints.restore("last", tree.unflatten(flat))
    for name, leaf in tree.flatten(back).items():
        assert leaf.sharding == flat[name].sharding and leaf.dtype == jnp.bfloat16
    same(back, jax.tree.map(lambda x: x.astype(jnp.bfloat16), tuned))


def test_an_optimizer_without_state_is_saved_too(opened):
    checkpoints, transform = opened(), optax.sgd(0.1)
    tuned, _ = state(1)
    checkpoints.save(1, tuned, transform.init(tuned), {})
    assert checkpoints.restore("last", abstract(tuned), transform.init(tuned))[2] == transform.init(tuned)


@pytest.mark.parametrize("end", ["donate", "delete"])
def test_buffers_that_are_reused_right_after_save_do_not_change_what_is_saved(opened, end):
    checkpoints = opened(keep_last=9)
    sharding = NamedSharding(mesh.over(jax.devices(), fsdp=8), P("fsdp"))
    destroy = jax.jit(lambda x: x * 0 - 7, donate_argnums=0)
    for step in range(3):
        x = jax.device_put(jax.random.normal(jax.random.key(step), (1024, 512)), sharding)
        want = np.array(x)
        checkpoints.save(step, {"w": x}, {"m": x}, {})
        if end == "delete":
            x.delete()
            jax.block_until_ready([jnp.full((1024, 512), -7.0) for _ in range(4)])
        else:
            for _ in range(3):
                x = destroy(x)
            jax.block_until_ready(x)
        like = jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=sharding)
        _, tuned, optimizer, _ = checkpoints.restore(step, {"w": like}, {"m": like})
        np.testing.assert_array_equal(tuned["w"], want)
        np.testing.assert_array_equal(optimizer["m"], want)


def test_the_best_step_survives_many_later_saves(opened):
    checkpoints = saved(opened(), 1, 2, 3, 4, 5, 6, metrics=[3.0, 1.0, 2.0, None, float("nan"), 1.5])
    assert (checkpoints.steps(), checkpoints.last(), checkpoints.best()) == ([2, 6], 6, 2)
    assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["2", "6"]
    assert checkpoints.restore("best", template()[0])[0] == 2


def test_a_resumed_run_knows_the_best_step_and_a_lower_metric_replaces_it(opened):
    saved(opened(), 1, 2, metrics=[1.0, 2.0]).close()
    resumed = opened()
    assert (resumed.last(), resumed.best()) == (2, 1)
    assert saved(resumed, 3, metrics=[1.5]).steps() == [1, 3]
    assert saved(resumed, 4, metrics=[0.5]).steps() == [4] and resumed.best() == 4


def test_keep_last_counts_the_newest_and_keep_best_can_be_switched_off(opened, tmp_path):
    assert saved(opened(tmp_path / "a", keep_last=2), 1, 2, 3, 4, metrics=[1, 2, 3, 4]).steps() == [1, 3, 4]
    assert saved(opened(tmp_path / "b", keep_best=False), 1, 2, 3, metrics=[1, 2, 3]).steps() == [3]
    with pytest.raises(ValueError, match="keep_last=0"):
        opened(keep_last=0)


def test_without_any_metric_there_is_no_best_step(opened):
    checkpoints = saved(opened(), 1)
    assert checkpoints.best() is None
    with pytest.raises(ValueError, match=r"no checkpoint 'best'.*steps: \[1\]"):
        checkpoints.restore("best", template()[0])


def test_a_step_is_saved_once(opened):
    checkpoints = opened()
    tuned, optimizer = state(1)
    checkpoints.save(1, tuned, optimizer, {})
    assert checkpoints.has(1) and not checkpoints.has(2)
    with pytest.raises(ValueError, match="Step 1 is saved already"):
        checkpoints.save(1, tuned, optimizer, {})


def test_a_save_in_flight_is_not_the_last_step(opened):
    checkpoints = saved(opened(), 1)
    tuned, optimizer = state(2)
    checkpoints.save(2, tuned, optimizer, {})
    assert checkpoints.last() == 1 and checkpoints.has(2)
    checkpoints.wait()
    assert checkpoints.last() == 2


def test_cut_removes_later_steps_which_can_then_be_saved_again(opened):
    checkpoints = saved(opened(keep_last=9), 1, 2, 3, metrics=[3.0, 2.0, 1.0])
    checkpoints.cut(1)
    assert (checkpoints.steps(), checkpoints.best()) == ([1], 1)
    assert saved(checkpoints, 2, metrics=[9.0]).best() == 1


@pytest.mark.parametrize("meta", [{1: 2}, {"a": (1, 2)}, {"a": float("nan")}, {"a": np.float32(1)}, {"a": {1, 2}}])
def test_a_meta_that_json_would_change_is_refused(opened, meta):
    tuned, optimizer = state(1)
    with pytest.raises(ValueError, match="does not survive JSON"):
        opened().save(1, tuned, optimizer, meta)


def test_a_tree_that_is_not_the_saved_one_is_named_leaf_by_leaf(opened):
    checkpoints = saved(opened(), 1)
    tuned, _ = template()
    other = {**tuned, "norm": {"scale": jax.ShapeDtypeStruct((9,), jnp.float32, sharding=tuned["norm"]["scale"].sharding)}}
    other["extra"] = {"kernel": tuned["norm"]["scale"]}
    with pytest.raises(ValueError, match=r"tuned: missing: extra/kernel; wrong shape: norm/scale \(8,\), expected \(9,\)"):
        checkpoints.restore("last", other)
    with pytest.raises(ValueError, match="tuned: unexpected: blocks/0-15/attn/q/kernel"):
        checkpoints.restore("last", {"norm": tuned["norm"]})
    with pytest.raises(ValueError, match=r"optimizer: missing: .*unexpected: "):
        checkpoints.restore("last", tuned, abstract(optax.lion(1e-3).init(state(1)[0])))
    with pytest.raises(ValueError, match="these have none: norm/scale"):
        checkpoints.restore("last", {**tuned, "norm": {"scale": jax.ShapeDtypeStruct((8,), jnp.float32)}})


def test_an_empty_directory_has_no_step_to_restore(opened):
    checkpoints = opened()
    assert (checkpoints.steps(), checkpoints.last(), checkpoints.best()) == ([], None, None)
    with pytest.raises(ValueError, match="no checkpoint 'last'"):
        checkpoints.restore("last", template()[0])


DAMAGE = {
    "flip": lambda path, _: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "truncate": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "delete": lambda path, _: path.unlink(),
    "zero": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
    "swap": lambda path, other: path.write_bytes(other.read_bytes()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damaged_file_is_refused_by_name(opened, kind):
    checkpoints = saved(opened(keep_last=9), 1, 2)
    root, reader, refused = checkpoints.directory / "2", opened(read_only=True), 0
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")):
        before = path.read_bytes()
        # data files have random names: any file of the other step's same folder stands in
        other = next(p for p in (checkpoints.directory / "1" / path.parent.relative_to(root)).iterdir() if p.is_file())
        named = checkpoints.directory / "1" / path.relative_to(root)
        other = named if named.exists() else other
        if kind == "swap" and other.read_bytes() == before:
            continue
        DAMAGE[kind](path, other)
        with pytest.raises(ValueError, match=f"step 2: .*{'' if kind == 'swap' else path.name}"):
            reader.restore(2, *template())
        refused += 1
        path.write_bytes(before)
    assert refused > 5
    same(reader.restore(2, *template())[1:3], state(2))


def test_a_flipped_bit_anywhere_in_the_manifest_is_refused(opened):
    checkpoints = saved(opened(), 1)
    path = checkpoints.directory / "1" / "manifest.json"
    before = path.read_bytes()
    for place in [i for i in range(0, len(before), 37) if before[i : i + 1].strip()]:
        path.write_bytes(before[:place] + bytes([before[place] ^ 4]) + before[place + 1 :])
        with pytest.raises(ValueError, match="Damaged checkpoint"):
            checkpoints.restore(1, *template())


def test_a_damaged_last_step_is_replaced_by_the_newest_intact_one_loudly_and_can_be_saved_again(opened, caplog):
    checkpoints = saved(opened(keep_last=9), 1, 2, 3)
    (checkpoints.directory / "3" / "tuned" / "manifest.ocdbt").write_bytes(b"x")
    (checkpoints.directory / "2" / "manifest.json").unlink()
    with caplog.at_level(logging.ERROR):
        step, tuned, optimizer, _ = checkpoints.restore("last", *template())
    assert step == 1 and checkpoints.steps() == [1]
    same((tuned, optimizer), state(1))
    assert "step 3" in caplog.text and "tuned/manifest.ocdbt" in caplog.text and "step 2" in caplog.text
    assert (checkpoints.directory / "3.damaged").exists()
    assert saved(checkpoints, 2, 3).steps() == [1, 2, 3]


def test_if_every_step_is_damaged_nothing_is_restored(opened):
    checkpoints = saved(opened(), 1)
    (checkpoints.directory / "1" / "meta" / "metadata").write_text("{}")
    with pytest.raises(ValueError, match="step 1: changed or missing: meta/metadata"):
        checkpoints.restore("last", template()[0])
    assert checkpoints.steps() == [1]


def test_a_save_that_fails_is_reported_for_its_step_and_the_next_one_is_tried(opened):
    checkpoints = saved(opened(), 1)
    big = {"w": jax.random.normal(jax.random.key(0), (512, 512))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))  # files longer than this fail as on a full disk
    try:
        checkpoints.save(2, big, {}, {}, 0.5)
        with pytest.raises(RuntimeError, match=r"The checkpoint of step 2 was not saved; the newest .* step 1"):
            checkpoints.wait()
        checkpoints.save(3, big, {}, {})
        with pytest.raises(RuntimeError, match="step 3 was not saved"):
            checkpoints.save(4, big, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (checkpoints.steps(), checkpoints.best()) == ([1], None)
    assert [p.name for p in checkpoints.directory.iterdir()] == ["1"]
    assert saved(checkpoints, 4).steps() == [4]


def test_a_failure_between_writing_and_committing_leaves_the_step_unseen(opened, monkeypatch):
    checkpoints = opened()
    monkeypatch.setattr("tuning.training.checkpoint.json.dumps", lambda *a, **k: 1 / 0 if "indent" in k else json.JSONEncoder().encode(*a))
    tuned, optimizer = state(1)
    checkpoints.save(1, tuned, optimizer, {})
    with pytest.raises(RuntimeError, match="step 1 was not saved"):
        checkpoints.close()
    assert list(checkpoints.directory.iterdir()) == []


def test_a_disk_without_room_is_noticed_before_anything_is_written(opened, monkeypatch):
    checkpoints = saved(opened(), 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    tuned, optimizer = state(2)
    with pytest.raises(OSError, match=r"step 2 takes up to .* bytes; .* has 10 left"):
        checkpoints.save(2, tuned, optimizer, {})
    assert checkpoints.steps() == [1] and not checkpoints.has(2)


def test_a_reader_leaves_the_directory_as_it_is(opened, tmp_path):
    checkpoints = saved(opened(keep_last=9), 1, 2)
    (checkpoints.directory / "2" / "manifest.json").write_text("{")
    (checkpoints.directory / "3.orbax-checkpoint-tmp").mkdir()
    before = sorted(p for p in checkpoints.directory.rglob("*"))
    reader = opened(read_only=True)
    assert reader.restore("last", template()[0])[0] == 1
    assert sorted(p for p in checkpoints.directory.rglob("*")) == before
    assert opened(tmp_path / "none", read_only=True).steps() == [] and not (tmp_path / "none").exists()


def run(script: str, *arguments: str) -> subprocess.Popen:
    lines = "import jax, sys, numpy as np\nfrom tuning.training.checkpoint import Checkpoints\n" + textwrap.dedent(script)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root, "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, "-c", lines, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_process_killed_before_the_commit_leaves_the_step_before_and_its_remains_are_swept(opened, tmp_path):
    child = run(
        """
        import os, signal
        from tuning.training import checkpoint
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, {"w": jax.numpy.ones(4)}, {}, {})
        checkpoints.wait()
        checkpoint._mark = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(2, {"w": jax.numpy.zeros(4)}, {}, {})
        checkpoints.wait()
        """,
        str(tmp_path),
    )
    output, _ = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, output
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists()
    checkpoints = opened()
    like = {"w": abstract(jnp.ones(4))}
    assert checkpoints.steps() == [1] and checkpoints.restore("last", like)[1]["w"].tolist() == [1.0] * 4
    checkpoints.save(2, {"w": jnp.zeros(4)}, {}, {})
    checkpoints.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


def test_two_processes_save_together_and_one_restores(opened, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    script = """
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
        from jax.sharding import NamedSharding, PartitionSpec
        rows = NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec("x"))
        make = lambda k: jax.make_array_from_callback((8, 2), rows, lambda i: np.arange(16, dtype=np.float32).reshape(8, 2)[i] + k)
        checkpoints = Checkpoints(sys.argv[1], keep_last=2)
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": make(step)}, {"m": make(-step)}, {"k": step}, metric=float(step))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3], checkpoints.steps()
        if jax.process_index() == 0:
            (checkpoints.directory / "3" / "tuned" / "manifest.ocdbt").write_bytes(b"x")
        checkpoints._manager.reload()
        jax.experimental.multihost_utils.sync_global_devices("damaged")
        like = {"w": jax.ShapeDtypeStruct((8, 2), np.float32, sharding=rows)}
        step, tuned, _, meta = checkpoints.restore("last", like)
        assert (step, meta, checkpoints.steps()) == (2, {"k": 2}, [1, 2])
        for shard in tuned["w"].addressable_shards:
            np.testing.assert_array_equal(shard.data, np.arange(16, dtype=np.float32).reshape(8, 2)[shard.index] + 2)
        checkpoints.close()
    """
    script = "import jax.experimental.multihost_utils\n" + textwrap.dedent(script)
    children = [run(script, str(tmp_path), address, str(i)) for i in range(2)]
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output
    sharding = NamedSharding(mesh.over(jax.devices(), fsdp=8), P("fsdp"))
    like = {"w": jax.ShapeDtypeStruct((8, 2), np.float32, sharding=sharding)}
    np.testing.assert_array_equal(opened().restore("last", like)[1]["w"], np.arange(16, dtype=np.float32).reshape(8, 2) + 2)
