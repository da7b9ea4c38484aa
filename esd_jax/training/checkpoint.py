"""Orbax checkpoints of a run: {theta, opt, step, key}, and what the run is; and trees of tensors alone.

The only place that imports orbax.
"""

import contextlib
import json
import logging
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esd_jax.training.step import State

TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a checkpoint's folder until it is complete
CHECKSUM = "checksum"  # the key in a checkpoint's meta of {"meta": ..., "state": ...}, both CRC-32


class DamagedCheckpoint(UserWarning):
    """A checkpoint that cannot be read, in whose place an older one is used."""


class Checkpoints:
    """The checkpoints of one run folder, used as a context manager. Saves are asynchronous and atomic.

    Args:
      folder: where they lie; created if needed.
      meta: what the run is (base, method, settings); a checkpoint of another run is refused.
      keep: how many of the newest are kept.
      read_only: nothing is written or cleaned up: the run may be going on in another process.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], *, keep: int = 2, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every file it writes
        import orbax.checkpoint as ocp

        self._ocp, self.folder, self.meta, self._read_only = ocp, folder, dict(meta), read_only
        if read_only:
            if not folder.is_dir():
                raise FileNotFoundError(f"no checkpoint in {folder}")
            options = ocp.CheckpointManagerOptions(read_only=True, create=False)
        else:
            # Of a save that was killed. The manager would remove it later, at the same time as all else.
            for path in folder.glob(f"*{TEMPORARY}*") if jax.process_index() == 0 else ():
                shutil.rmtree(path, ignore_errors=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with self._writing():
                try:
                    self._manager.wait_until_finished()
                finally:
                    self._manager.close()
        except OSError:
            if error is None:  # else it is known
                raise
        if error is None and not self._read_only:  # what was damaged has been replaced, or is no longer needed
            for path in self.folder.glob(".*.damaged"):
                shutil.rmtree(path, ignore_errors=True)

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    @property
    def steps(self) -> frozenset[int]:
        """The steps of all complete checkpoints."""
        return frozenset(self._manager.all_steps())

    def at(self, step: int, like: State) -> State | None:
        """The checkpoint of a step, as `restore` gives it; None if it is damaged. Raises as `restore` else."""
        try:
            return self._read(step, like, check=True)
        except _Damaged:
            return None

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which a run that goes on from here makes again."""
        self.wait()
        for later in self.steps:
            if later > step:
                self._manager.delete(later)

    def save(self, state: State) -> None:
        """Saves under `state.step`; returns once the values are copied, so `state` may be donated at once.

        Raises FloatingPointError, and saves nothing, if theta holds NaN or infinity.
        """
        step = int(state.step)
        if step == self.latest:
            return
        checksum, finite = _checksum(state)
        if not finite:
            raise FloatingPointError(f"the weights after step {step} hold NaN or infinity, so they are not saved")
        sums = {"meta": _crc(self.meta), "state": checksum, **_memory_sum(state)}
        args, meta = self._ocp.args, {**self.meta, CHECKSUM: sums}
        with self._writing():
            self._manager.save(
                step,
                args=args.Composite(
                    **{name: args.StandardSave(part) for name, part in _parts(state).items()},
                    meta=args.JsonSave(meta),
                ),
            )

    def wait(self) -> None:
        """Blocks until what was saved is on disk. Raises OSError in one line if it cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def discard(self, step: int) -> None:
        """Deletes the checkpoint of `step`, if there is one, unless it is the only one."""
        self.wait()
        steps = self._manager.all_steps()
        if step in steps and len(steps) > 1:
            self._manager.delete(step)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax passes on what its threads raise, of any type
            reason = str(error).rsplit(": ", 1)[-1].split(" [")[0]  # "...: File too large [os_error_code='27']"
            raise OSError(f"cannot write a checkpoint to {self.folder}: {reason}") from error

    def restore(self, like: State, step: int | None = None, *, check: bool = True) -> State:
        """The newest checkpoint (or that of `step`), with the shapes, dtypes and placement of `like`.

        `like` may be shapes alone (`jax.eval_shape`); they are put on the first device.

        `check` refuses the checkpoint of a run whose meta is another one.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it is damaged; or it belongs to a run with other settings; names the first that differs.
        """
        step = self.latest if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise FileNotFoundError(f"no checkpoint{'' if step is None else f' of step {step}'} in {self.folder}")
        try:
            return self._read(step, like, check)
        except _Damaged as error:
            others = sorted(set(self._manager.all_steps()) - {step})
            fix = f"the one of step {others[-1]} may be good: name that step" if others else "there is no other"
            raise ValueError(f"{self._damaged(step, error)}; {fix}") from error

    def resume(self, like: State) -> State:
        """The newest checkpoint that is not damaged, from which the run then goes on; see `restore`.

        Damaged ones are set aside as `.STEP.damaged`, with a warning, until the run has succeeded.

        Raises FileNotFoundError, ValueError as `restore` does, which leave everything as it is; damaged are all.
        """
        steps, damage = sorted(self._manager.all_steps(), reverse=True), {}
        for step in steps:
            try:
                state = self._read(step, like, check=True)
            except _Damaged as error:
                damage[step] = self._damaged(step, error)
                continue
            for other, what in damage.items():
                self._set_aside(other)
                warnings.warn(f"{what}; going on from step {step}", DamagedCheckpoint, stacklevel=2)
            return state
        if not damage:
            raise FileNotFoundError(f"no checkpoint in {self.folder}")
        raise ValueError(f"{damage[steps[0]]}; {'so are all others' if len(damage) > 1 else 'there is no other'}")

    def _read(self, step: int, like: State, check: bool) -> State:
        """A checkpoint's state. Raises _Damaged; ValueError for another run's."""
        args = self._ocp.args
        with self._reading():
            meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
            sums = meta.pop(CHECKSUM, {})  # older versions wrote none
            if sums and sums.get("meta") != _crc(meta):
                raise _Damaged("its settings have changed since they were written")
        for name in sorted(self.meta.keys() | meta.keys()) if check else ():
            if self.meta.get(name) != meta.get(name):
                raise ValueError(
                    f"the checkpoint in {self.folder} was made with {name}={meta.get(name)!r}, not "
                    f"{self.meta.get(name)!r}: resume with the same settings, or start anew in another output_dir"
                )
        target = jax.tree.map(_abstract, _parts(like))
        with self._reading():
            parts = {name: args.StandardRestore(part) for name, part in target.items()}
            restored = self._manager.restore(step, args=args.Composite(**parts))
            state = State(**restored["state"], **({"memory": restored["memory"]} if "memory" in target else {}))
        computed = {"state": _checksum(state)[0], **_memory_sum(state)}
        if sums and any(sums.get(name) != value for name, value in computed.items()):
            raise _Damaged("its values have changed since they were written")
        return state

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Distinguishes damage from a machine that cannot read just now."""
        try:
            yield
        except _Damaged:
            raise
        except Exception as error:  # orbax passes on what its threads raise, of any type
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error):
                raise PermissionError(f"cannot read a checkpoint in {self.folder}: permission denied") from error
            raise _Damaged(type(error).__name__) from error

    def _damaged(self, step: int, error: Exception) -> str:
        return f"the checkpoint of step {step} in {self.folder} is damaged or incomplete ({error})"

    def _set_aside(self, step: int) -> None:
        aside = self.folder / f".{step}.damaged"
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
        self._manager.reload()


class _Damaged(Exception):
    """Why a checkpoint cannot be used."""


def _crc(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _checksum(state: State) -> tuple[int, bool]:
    """(CRC-32 of all values, whether theta is finite): the same on any number of devices and processes.

    The store finds files that are missing or cut short, but takes changed bytes of a tensor as they are.
    """
    theta, rest = (jax.tree.leaves(part) for part in (state.theta, (state.opt, state.step, state.key)))
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(_crc_and_finite, map(_on_host, [*theta, *rest])))
    values = np.asarray([crc for crc, _ in sums], "<u4").tobytes()
    return zlib.crc32(values), all(finite for _, finite in sums[: len(theta)])


def _memory_sum(state: State) -> dict[str, int]:
    """The same of what a method keeps, where it keeps anything."""
    leaves = jax.tree.leaves(state.memory)
    return {"memory": zlib.crc32(str([_crc_and_finite(_on_host(a))[0] for a in leaves]).encode())} if leaves else {}


def _on_host(array: jax.Array) -> np.ndarray:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if not (array.is_fully_addressable or array.is_fully_replicated):  # one by one, so that all never lie on one device
        assert isinstance(array.sharding, jax.sharding.NamedSharding)  # as `sharding.place` gives every array
        whole = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
        array = jax.jit(lambda a: a, out_shardings=whole)(array)
    # Of the first device's part, as an array of its own, no copy is kept on the host.
    return np.asarray(array.addressable_data(0) if array.is_fully_replicated else array)


def _crc_and_finite(values: np.ndarray) -> tuple[int, bool]:
    floating = jnp.issubdtype(values.dtype, jnp.floating)
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return zlib.crc32(data.data), not floating or bool(np.isfinite(values).all())


def save_tree(folder: Path, tree: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Writes arrays by name, each in its own dtype, and what they are, as one checkpoint. It appears complete, or not.

    Raises OSError in one line if it cannot be written; ValueError if `folder` exists.
    """
    with _checkpointer() as (ocp, checkpointer):
        parts = {"params": ocp.args.StandardSave(dict(tree)), "meta": ocp.args.JsonSave(dict(meta))}
        if folder.exists():
            raise ValueError(f"{folder} exists")
        try:
            checkpointer.save(folder.absolute(), args=ocp.args.Composite(**parts))
        except Exception as error:  # orbax passes on what its threads raise, of any type
            reason = str(error).rsplit(": ", 1)[-1].split(" [")[0]
            raise OSError(f"cannot write a checkpoint to {folder}: {reason}") from error


def load_tree(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays by name, what they are) of a folder that `save_tree` wrote.

    Raises FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    if not (folder / "params").is_dir():
        raise FileNotFoundError(f"there is no checkpoint in {folder}")
    with _checkpointer() as (ocp, checkpointer):
        parts = {"params": ocp.args.StandardRestore(), "meta": ocp.args.JsonRestore()}
        try:
            restored = checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**parts))
        except Exception as error:
            raise ValueError(f"the checkpoint in {folder} is damaged or incomplete ({type(error).__name__})") from error
    return dict(restored["params"]), dict(restored["meta"])


@contextlib.contextmanager
def _checkpointer() -> Iterator[tuple[Any, Any]]:
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every file it writes
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        yield ocp, checkpointer


def _parts(state: State) -> dict[str, Any]:
    """A state as what lies in folders of its own. A method's memory is one only where there is any, so that runs
    without any keep their layout, and so that the weights can be read without knowing what else was kept."""
    fields = state._asdict()
    memory = fields.pop("memory")
    return {"state": fields, **({"memory": memory} if jax.tree.leaves(memory) else {})}


def _abstract(array: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = array.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
