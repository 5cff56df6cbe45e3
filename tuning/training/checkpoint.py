"""Checkpoints: what was learned, the optimizer's state and a few small facts, saved while training goes on and verified when read.

A step's directory holds three items, `tuned`, `optimizer` (arrays) and `meta` (JSON), and manifest.json with the size and the SHA-256
of every file. It is written under a temporary name and renamed when all of it is there, so a step that can be seen is whole.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tuning.core import tree
from tuning.core.types import Tree

MANIFEST = "manifest.json"
TEMPORARY = ".orbax-checkpoint-tmp"
# Orbax writes these two after the manifest, at the very end of a commit; they hold a time stamp and a note.
UNLISTED = (MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt")

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in one directory, which all processes share. Every process makes one, and makes the same calls.

    keep_last  how many of the newest steps are kept
    keep_best  whether the step with the lowest metric is kept besides
    read_only  for readers of a run that may still be going on: nothing is created, moved or removed
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep_last: int = 1, keep_best: bool = True, read_only: bool = False):
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: at least the newest checkpoint is kept. Set it to 1 or more.")
        self.directory = pathlib.Path(directory).absolute()
        self._keep = keep_last, keep_best
        self._read_only = read_only
        self._saving: int | None = None
        self._metrics: dict[int, float] = {}  # of steps whose metric is finite, pending ones too
        arrays = {item: ocp.PyTreeCheckpointHandler() for item in ("tuned", "optimizer")}
        with _quiet(logging.ERROR if read_only else logging.WARNING):  # that nothing is written is announced as three warnings
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                save_root_metadata=False,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
            )
            self._manager = ocp.CheckpointManager(
                self.directory, item_handlers={**arrays, "meta": ocp.JsonCheckpointHandler()}, options=options
            )
        self._steps = sorted(self._manager.all_steps())
        for step in self._steps:
            self._note(step, _metric(self.directory / str(step)))

    def steps(self) -> list[int]:
        """The steps on disk, in order, as of the last `wait`: a save in flight is not among them."""
        return list(self._steps)

    def last(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest metric, the earliest of equals; None if no step has a finite one."""
        return self._best(self.steps())

    def has(self, step: int) -> bool:
        """Whether a step is saved, or is being saved."""
        return step in self._steps or step == self._saving

    def save(self, step: int, tuned: Tree, optimizer: Any, meta: Mapping[str, Any], metric: float | None = None) -> None:
        """Copies the arrays, which may be donated as soon as this returns, and writes them in the background.

        `optimizer` is any pytree of arrays; `meta` is anything that JSON gives back unchanged. Raises what `wait` raises, for the step
        before; ValueError for a step that is saved already, or a meta that JSON would change; OSError if the disk has no room.
        """
        self.wait()
        if self.has(step):
            raise ValueError(f"Step {step} is saved already in {self.directory}; ask has(step) first, or cut(step - 1) to start again.")
        if _through_json(meta) != meta:
            raise ValueError(f"meta={meta!r} does not survive JSON: use finite numbers, text, lists, and dicts with text as keys.")
        items = {"tuned": _named(tuned), "optimizer": _named(optimizer)}
        self._check_space(step, items)
        shapes = {item: {name: list(leaf.shape) for name, leaf in tree.flatten(leaves).items()} for item, leaves in items.items()}
        facts = {"step": step, "metric": metric if metric is not None and math.isfinite(metric) else None, "leaves": shapes, "meta": meta}
        arrays = {item: ocp.args.PyTreeSave(leaves) for item, leaves in items.items() if leaves}
        self._note(step, facts["metric"])
        self._saving = step
        try:
            self._manager.save(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(facts)), force=True)
        except Exception as error:
            raise self._failed() from error

    def wait(self) -> None:
        """Until the save in flight is on disk. RuntimeError that names the step, if it failed; the next save starts afresh."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed() from error
        self._saving, self._steps = None, sorted(self._manager.all_steps())

    def close(self) -> None:
        """Waits as `wait` does; call it before the process ends."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, which: str | int, tuned: Tree, optimizer: Any = None) -> tuple[int, Tree, Any, dict[str, Any]]:
        """(step, tuned, optimizer, meta) of "last", "best" or a step; an item whose abstract tree is None is not read.

        The abstract leaves are jax.ShapeDtypeStructs with a sharding, of any mesh; values are cast to their dtype. Every file that is
        read is verified: if "last" is damaged, the newest intact step takes its place, with an error in the log, and the damaged ones
        are set aside. ValueError for any other damaged step, and for a tree that is not the saved one.
        """
        self.wait()
        abstract = {item: _named(leaves) for item, leaves in (("tuned", tuned), ("optimizer", optimizer)) if leaves is not None}
        step = self._intact(which, [item for item, leaves in abstract.items() if leaves])
        facts = _facts(self.directory / str(step))
        for item, leaves in abstract.items():
            _check_leaves(f"The checkpoint of step {step}", item, facts["leaves"][item], leaves)
        wanted = {
            item: ocp.args.PyTreeRestore(leaves, restore_args=ocp.checkpoint_utils.construct_restore_args(leaves))
            for item, leaves in abstract.items()
            if leaves
        }
        arrays = self._manager.restore(step, args=ocp.args.Composite(**wanted)) if wanted else {}
        found = {item: arrays[item] if item in wanted else {} for item in abstract}
        return step, _like(tuned, found.get("tuned")), _like(optimizer, found.get("optimizer")), facts["meta"]

    def cut(self, step: int) -> None:
        """Removes the steps after `step`, for a run that starts again from an earlier one."""
        self.wait()
        for later in [s for s in self.steps() if s > step]:
            self._manager.delete(later)
        self._reload()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks at each save, the new step included, and deletes the others once that step is on disk."""
        steps = [info.step for info in checkpoints]
        last, best = self._keep
        kept = {*steps[-last:], *([self._best(steps)] if best else [])}
        return [step in kept for step in steps]

    def _best(self, steps: Sequence[int]) -> int | None:
        return min((step for step in steps if step in self._metrics), key=lambda step: self._metrics[step], default=None)

    def _note(self, step: int, metric: float | None) -> None:
        self._metrics.pop(step, None)
        if metric is not None:
            self._metrics[step] = metric

    def _reload(self) -> None:
        self._manager.reload()
        self._steps = sorted(self._manager.all_steps())

    def _failed(self) -> RuntimeError:
        """What to raise about the save in flight, whose remains are removed."""
        step, self._saving = self._saving, None
        if jax.process_index() == 0:
            for remains in self.directory.glob(f"{step}{TEMPORARY}*"):
                shutil.rmtree(remains, ignore_errors=True)
        self._reload()
        return RuntimeError(f"The checkpoint of step {step} was not saved; the newest in {self.directory} is that of step {self.last()}.")

    def _check_space(self, step: int, items: Tree) -> None:
        """Before anything is written. One process only: several could disagree, and then wait for one another."""
        need, free = tree.nbytes(items), shutil.disk_usage(self.directory).free
        if jax.process_count() == 1 and need > free:
            text = f"The checkpoint of step {step} takes up to {need:,} bytes; {self.directory} has {free:,} left. Make room there."
            raise OSError(errno.ENOSPC, text)

    def _write_manifest(self) -> None:
        """Orbax calls this on the first process, in the background, when every file is written and nothing is committed yet."""
        (root,) = self.directory.glob(f"{self._saving}{TEMPORARY}*")
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name not in UNLISTED)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            marks = pool.map(lambda name: _mark(root / name), names)
            (root / MANIFEST).write_text(json.dumps(dict(zip(names, marks, strict=True)), indent=0))

    def _intact(self, which: str | int, items: Sequence[str]) -> int:
        """The step that is meant, verified."""
        named = {"last": self.last(), "best": self.best()}
        wanted = named.get(which) if isinstance(which, str) else which
        if wanted not in self._steps:
            raise ValueError(f"There is no checkpoint {which!r} in {self.directory}; steps: {self._steps}, best: {named['best']}.")
        damaged: dict[int, str] = {}
        for step in reversed(self._steps) if which == "last" else [wanted]:
            damage = _damage(self.directory / str(step), items)
            if damage is None:
                self._set_aside(damaged)
                return step
            damaged[step] = damage
            log.error("The checkpoint of step %d in %s is damaged: %s.", step, self.directory, damage)
        text = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
        raise ValueError(f"Damaged checkpoint in {self.directory}: {text}. restore('last') looks for the newest intact one.")

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        """Renames damaged steps, so that the run may save them again."""
        if self._read_only or not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                aside = self.directory / f"{step}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
        ocp.multihost.sync_global_processes(f"tuning:set_aside:{min(damaged)}")
        self._reload()


@contextlib.contextmanager
def _quiet(level: int) -> Iterator[None]:
    """Orbax speaks through absl's logger; this lets only what is at least as grave as `level` through."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _named(leaves: Any) -> Tree:
    """A pytree as a nested dict, by its leaves' paths: named tuples and lists become dicts of names and numbers."""
    return tree.unflatten(dict(zip(_names(leaves), jax.tree.leaves(leaves), strict=True)))


def _names(leaves: Any) -> list[str]:
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_flatten_with_path(leaves)[0]]


def _like(abstract: Any, found: Tree | None) -> Any:
    """The inverse of `_named`."""
    if found is None:
        return None
    leaves = tree.flatten(found)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in _names(abstract)])


def _check_leaves(source: str, item: str, saved: Mapping[str, Sequence[int]], abstract: Tree) -> None:
    stored = tree.unflatten({name: jax.ShapeDtypeStruct(tuple(shape), np.float32) for name, shape in saved.items()})
    if wrong := tree.difference(abstract, stored):
        raise ValueError(f"{source} does not hold this run's {item}: {wrong}. Train with the settings that it was saved with.")
    if bare := [name for name, leaf in tree.flatten(abstract).items() if leaf.sharding is None]:
        raise ValueError(f"Leaves are restored onto a sharding, and these have none: {tree.listing(bare)}.")


def _facts(root: pathlib.Path) -> dict[str, Any]:
    return json.loads((root / "meta" / "metadata").read_text())


def _metric(root: pathlib.Path) -> float | None:
    """The metric of a step; None if it has none, or if it cannot be read: whoever restores the step will hear of it."""
    try:
        return _facts(root)["metric"]
    except (OSError, ValueError, KeyError):
        return None


def _through_json(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return None


def _mark(path: pathlib.Path) -> list[Any]:
    """[bytes, SHA-256] of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _damage(root: pathlib.Path, items: Sequence[str]) -> str | None:
    """What is wrong with the files of these items; None if nothing is. The processes share the work and agree."""
    unread = {"tuned", "optimizer"} - set(items)
    try:
        manifest = json.loads((root / MANIFEST).read_text())
        files = sorted((name, mark) for name, mark in manifest.items() if name.split("/")[0] not in unread)
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if not files:
        return f"{MANIFEST} is empty"
    mine = range(jax.process_index(), len(files), jax.process_count())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        bad = np.zeros(len(files), bool)
        bad[list(mine)] = list(pool.map(lambda i: not _holds(root / files[i][0], files[i][1]), mine))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        bad = np.asarray(multihost_utils.process_allgather(bad)).any(axis=0)
    changed = [files[i][0] for i in np.flatnonzero(bad)]
    return f"changed or missing: {tree.listing(changed)}" if changed else None


def _holds(path: pathlib.Path, mark: Any) -> bool:
    try:
        return _mark(path) == mark
    except OSError:
        return False
