"""What a training stage keeps on disk, and the way back from it.

    STAGE/steps/20/{state, extra, SEAL.json}   a checkpoint while the stage runs (Orbax)
    STAGE/final/{banks, extra, SEAL.json}      the banks at the stage's end
    STAGE/manifest.json                        written last: it exists = the stage is finished

Orbax renames a checkpoint into place once it is whole, or marks it as whole on object storage; its
seal is written after that (`staging`: where Orbax cannot write in place), and says which run, stage
and step it is of. Everything here is called by all processes alike; what is on the disk is judged
by the first one, and the others follow it.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from medmoe_jax.checkpoints import staging, waiting
from medmoe_jax.checkpoints.agreement import from_first_process
from medmoe_jax.checkpoints.folders import StageFolder
from medmoe_jax.checkpoints.manifest import Manifest
from medmoe_jax.checkpoints.records import remedy
from medmoe_jax.checkpoints.seals import SEAL, damage, read_seal, seal
from medmoe_jax.errors import StorageError, UserError, is_storage
from medmoe_jax.kinds import whole_number
from medmoe_jax.parallel import processes
from medmoe_jax.storage.objects import failures
from medmoe_jax.storage.places import absolute

# What Orbax and TensorStore raise when a file cannot be written.
WRITE_ERRORS = (OSError, ValueError, RuntimeError)

log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint cannot be written, or none can be read; the message names the folder."""


class WriteError(CheckpointError, StorageError):
    """A checkpoint cannot be written."""


class Restored(NamedTuple):
    """A restored checkpoint; `skipped` says in words which newer ones were passed over and why."""

    step: int
    state: Any
    extra: dict[str, Any]
    skipped: tuple[str, ...]


class StageCheckpoints:
    """The checkpoints of one running stage: asynchronous, atomic, sealed, the last `keep` kept.

    Use as a context manager, or call `close`. One process tree at a time may open a folder: what
    an interrupted save left behind is removed on opening.
    """

    def __init__(
        self, folder: StageFolder, keep: int = 3, of: Mapping[str, Any] | None = None
    ) -> None:
        """Open the checkpoints of a stage, whose folder is made if absent.

        Args:
          folder: the stage's.
          keep: how many finished checkpoints stay; with 1, the one before also stays until the
            next save, so that an interruption never leaves none.
          of: what the checkpoints belong to, JSON-able; those of anything else are refused.

        Raises:
          CheckpointError: the folder cannot be made or read.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint must be kept")
        self._steps = absolute(folder.steps)
        self._staging = contextlib.ExitStack()
        self._written = self._staging.enter_context(staging.written(self._steps))
        self._keep, self._of = keep, dict(of or {})
        self._current: int | None = None
        self._lost = False  # a save waits on for processes that will not come
        self._held: list[int] = []
        self._saving: futures.Future | None = None
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._orbax = self._open()
        if staging.is_staged(self._steps):
            self._remove(lambda step: not self._is_sealed(step))  # their uploads were cut short
        # A damaged step stays on the disk until a newer one is whole, but is not counted here.
        self._sealed = set(
            from_first_process(lambda: [step for step in self._on_disk() if self._is_sealed(step)])
        )

    def _open(self) -> ocp.training.Checkpointer:
        self._failed_save = False
        try:
            return ocp.training.Checkpointer(
                str(self._written),
                context=_context(),
                preservation_policy=self,
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            kind = WriteError if is_storage(error) else CheckpointError
            raise kind(f"cannot open the checkpoints in {self._steps}: {error}") from error

    def _release(self) -> None:
        # After a failed save, Orbax raises the error that was reported already on every call.
        with contextlib.suppress(*WRITE_ERRORS if self._failed_save else ()):
            self._orbax.close()

    def _on_disk(self) -> list[int]:
        try:
            names = [folder.name for folder in self._steps.iterdir()]
        except FileNotFoundError:  # on object storage, before the first save
            names = []
        steps = map(whole_number, names)
        return sorted((step for step in steps if step is not None), reverse=True)

    def _remove(self, chosen: Callable[[int], bool]) -> None:
        """Remove steps from object storage, which Orbax has not written there itself."""
        for step in filter(chosen, self._on_disk()):
            staging.discard(self._steps / str(step))

    def saved(self) -> list[int]:
        """Steps whose checkpoints are whole, in order."""
        return sorted(self._sealed)

    def _is_sealed(self, step: int) -> bool:
        return (self._steps / str(step) / SEAL).exists()

    def _owner(self, step: int) -> dict[str, Any]:
        return {**self._of, "step": step}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question at each save: the newest sealed ones stay, and the one being saved."""
        del context
        return [self._stays(c.step) for c in checkpoints]

    def _stays(self, step: int) -> bool:
        newest = sorted(self._sealed)[-max(self._keep - 1, 1) :]
        held = [one for one in self._held if one in self._sealed]
        return step in newest or step == self._current or step in held[-1:]

    def hold(self, step: int) -> None:
        """Let the checkpoint of a step stay, whatever comes after it.

        One that was held before is let go once that of `step` is whole.
        """
        self._held.append(step)

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Start saving; returns once the arrays are copied to host memory and may be donated.

        Waits for the save before. `wait` or the next call raises what went wrong in this one.

        Args:
          step: must not be saved already.
          state: pytree of jax arrays, under any sharding.
          extra: JSON-able and the same on every process: data iterator, counters, fingerprints.

        Raises:
          WriteError: this or the last save failed (disk full, ...); older ones are intact.
          ValueError: `step` is saved already, or `extra` is not JSON-able.
        """
        self.wait()
        if step in self._sealed:
            raise ValueError(f"step {step} is already saved in {self._steps}")
        try:
            json.dumps(extra)
        except TypeError as error:
            raise ValueError(f"extra must be JSON-able: {error}") from None
        if self._failed_save:
            self._release()
            self._orbax = self._open()
        self._current = step
        items = {"state": state, "extra": {"extra": extra, "leaves": _describe(state)}}
        # In a thread of ours: Ctrl-C strikes the main one, and in the middle of Orbax it would
        # leave threads that wait for each other for ever.
        copied = futures.Future()
        self._saving = self._pool.submit(self._write, step, items, copied)
        self._until_any(copied, self._saving)
        if not copied.done():
            self.wait()

    def _write(self, step: int, items: dict[str, Any], copied: futures.Future) -> None:
        try:
            saved = self._orbax.save_checkpointables_async(step, items, force=True, overwrite=True)
            if saved is None:
                raise RuntimeError(f"Orbax left out the checkpoint of step {step}")
            copied.set_result(None)
            saved.result()
            if processes.index() == 0:
                seal(self._written / str(step), self._owner(step))
                staging.publish(self._written / str(step), self._steps / str(step))
                if staging.is_staged(self._steps):
                    self._remove(lambda one: one < step and not self._stays(one))
        except (*WRITE_ERRORS, *failures()) as error:
            raise self._failed(step, error) from error
        self._sealed.add(step)

    def _failed(self, step: int | None, error: BaseException) -> WriteError:
        self._failed_save = True
        return WriteError(
            f"the checkpoint of step {step} could not be written to {self._steps}: {error}. "
            f"Earlier checkpoints are intact (steps {sorted(self._sealed)}); free space on the "
            "disk or mend its permissions, and start again to resume from the last one."
        )

    def wait(self) -> None:
        """Wait until the last save is finished. Raises WriteError if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            self._until_any(saving)
            saving.result()

    def _until_any(self, *works: futures.Future) -> None:
        try:
            waiting.until_any(works, self._written)
        except waiting.StorageLost as error:
            self._saving, self._lost = None, True
            raise self._failed(self._current, error) from error

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is whole, or None if no save was ever finished.

        Damaged and unfinished ones are passed over with a logged warning, and named in `skipped`.
        Without a seal nothing tells whether one is whole, so it is not used.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with the shardings to restore onto.

        Raises:
          CheckpointError: checkpoints exist and none is usable, the newest is of another run,
            stage or step, or the state asked for has other leaves, shapes or dtypes than the one
            saved.
        """
        self.wait()
        found = from_first_process(self._newest_whole)
        for problem in found["skipped"]:
            log.warning("checkpoint passed over: %s", problem)
        step = found["step"]
        if step is None and found["fresh"]:
            return None
        if step is None:
            raise CheckpointError(
                f"no checkpoint in {self._steps} is usable, and the stage does not start over by "
                f"itself: {'; '.join(found['skipped'])}. To start it over, remove the folder."
            )
        self._sealed = {sealed for sealed in self._sealed if sealed <= step} | {step}
        extra = self._load(step, {"extra": None})["extra"]
        _check_fit(self._steps / str(step), extra["leaves"], abstract_state)
        state = self._load(step, {"state": abstract_state})["state"]
        log.info("restored step %d from %s", step, self._steps)
        return Restored(step, state, extra["extra"], tuple(found["skipped"]))

    def restore_step(self, step: int, abstract_state: Any) -> Any:
        """The state of the checkpoint of one step; `abstract_state` as for `restore`.

        Raises:
          CheckpointError: it is not there, damaged, of another run, stage or step, or of other
            leaves, shapes or dtypes.
        """
        self.wait()
        folder = self._steps / str(step)
        if problem := from_first_process(lambda: damage(staging.readable(folder))):
            raise CheckpointError(problem)
        from_first_process(lambda: self._check_owner(step))
        extra = self._load(step, {"extra": None})["extra"]
        _check_fit(folder, extra["leaves"], abstract_state)
        return self._load(step, {"state": abstract_state})["state"]

    def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        if not staging.is_staged(self._steps):
            return self._orbax.load_checkpointables(step, wanted)
        with _context():
            folder = staging.readable(self._steps / str(step))
            return ocp.load_checkpointables(str(folder), wanted)

    def _newest_whole(self) -> dict[str, Any]:
        """{"step": newest usable step or None, "skipped": what is wrong with newer ones, "fresh":
        whether no save was ever finished}.
        """
        on_disk = self._on_disk()
        # One alone without a seal was killed in the first save: a later one leaves one before it.
        fresh = len(on_disk) == 0 or (len(on_disk) == 1 and not self._is_sealed(on_disk[0]))
        skipped = []
        for step in on_disk:
            folder = self._steps / str(step)
            if not self._is_sealed(step):
                skipped.append(f"{folder} was interrupted: its seal {SEAL} is not there")
            elif problem := damage(staging.readable(folder)):
                skipped.append(problem)
            else:
                self._check_owner(step)
                return {"step": step, "skipped": skipped, "fresh": False}
        return {"step": None, "skipped": skipped, "fresh": fresh}

    def _check_owner(self, step: int) -> None:
        folder = self._steps / str(step)
        there, here = read_seal(staging.readable(folder))[0], self._owner(step)
        others = [
            f"{k} {there.get(k)!r} and not {here[k]!r}" for k in here if there.get(k) != here[k]
        ]
        if others:
            raise CheckpointError(
                f"{folder} is not of this place: its {SEAL} says {', '.join(others)}; put the "
                f"checkpoints of {self._steps} back as they were written, or remove {folder}"
            )

    def close(self) -> None:
        """Wait for the last save and release the folder. Raises WriteError if it failed."""
        try:
            self.wait()
        finally:
            self._pool.shutdown(wait=not self._lost)
            if not self._lost:
                self._release()
            self._staging.close()

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def save_final(folder: StageFolder, tree: Any, manifest: Manifest) -> None:
    """Save a stage's end: a tree (nested dicts of jax arrays), then the manifest, which names it.

    A save that is interrupted leaves no manifest and is simply made again.

    Args:
      folder: the stage's.
      tree: what it left.
      manifest: without the fingerprint of the seal.

    Raises:
      ValueError: the stage is finished already.
      WriteError: the disk is full or cannot be written; there is no manifest then.
    """
    if folder.is_finished():
        raise ValueError(f"{folder.manifest} exists: the stage is finished already")
    final = absolute(folder.final)
    try:
        with staging.written(final) as there:

            def save() -> None:
                with _context():
                    items = {"banks": tree, "extra": {"leaves": _describe(tree)}}
                    ocp.save_checkpointables(str(there), items, overwrite=True)

            waiting.done(save, there.parent)

            def close() -> None:
                of = {"stage": manifest.stage, "recipe": manifest.recipe_fingerprint}
                fingerprint = seal(there, of)
                staging.publish(there, final)
                dataclasses.replace(manifest, seal=fingerprint).write(folder.manifest)

            from_first_process(close)
    except (*WRITE_ERRORS, *failures()) as error:
        raise WriteError(
            f"the stage's end could not be written to {final}: {error}. Free space on the disk or "
            "mend its permissions, and start again: the stage's checkpoints are intact."
        ) from error


def check_final(folder: StageFolder) -> None:
    """Raise CheckpointError unless what a stage left is what its manifest names, byte by byte.

    Raises UserError for a manifest that is not valid.
    """
    named = Manifest.read(folder.manifest).seal
    final = staging.readable(absolute(folder.final))

    def problem() -> str:
        if found := damage(final):
            return found
        if read_seal(final)[1] != named:
            return f"{final} is not what {folder.manifest} names: it is of another end of a stage"
        return ""

    if found := from_first_process(problem):
        raise CheckpointError(f"{found}; {remedy(folder.path)}")


def abstract_final(folder: StageFolder) -> Any:
    """What `save_final` was given, as nested dicts of `ShapeDtypeStruct` without shardings."""
    final = staging.readable(absolute(folder.final))
    with _context():
        metadata = ocp.checkpointables_metadata(str(final)).metadata
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata["banks"]
    )


def load_final(
    folder: StageFolder, arrange: Callable[[Any], Any] | None = None
) -> tuple[Any, Manifest]:
    """The tree and the manifest that `save_final` was given.

    Args:
      folder: the finished stage's.
      arrange: gives shardings to the tree of shapes (`abstract_final`) that is to be loaded; None
        loads everything, each array whole on one device.

    Raises:
      CheckpointError: the stage is not finished, its files are damaged or not its own, or the tree
        asked for has other leaves, shapes or dtypes than the one saved.
      UserError: the manifest is not valid.
    """
    if not folder.is_finished():
        raise CheckpointError(
            f"{folder.path} holds no finished stage: {folder.manifest.name} is not there"
        )
    check_final(folder)
    abstract = (arrange or _on_one_device)(abstract_final(folder))
    final = staging.readable(absolute(folder.final))
    with _context():
        extra = ocp.load_checkpointables(str(final), {"extra": None})["extra"]
        _check_fit(final, extra["leaves"], abstract)
        tree = ocp.load_checkpointables(str(final), {"banks": abstract})["banks"]
    return tree, Manifest.read(folder.manifest)


def _on_one_device(tree: Any) -> Any:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree
    )


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="extra")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _describe(tree: Any) -> dict[str, str]:
    """For each leaf's path its dtype and shape, such as float32[8, 2]."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_fit(folder: Path, saved: dict[str, str], abstract: Any) -> None:
    asked = _describe(abstract)
    for path in sorted(saved.keys() | asked.keys()):
        there, here = saved.get(path, "absent"), asked.get(path, "absent")
        if there != here:
            raise CheckpointError(
                f"{folder} does not fit what is to be restored: {path} is {there} in the "
                f"checkpoint and {here} in this run. Was the recipe changed?"
            )
