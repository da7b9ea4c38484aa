"""Orbax checkpoints of a run: {theta, opt, step, key}, and what the run is; and trees of tensors alone.

The only place that imports orbax.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from esd_jax.training.step import State


class Checkpoints:
    """The checkpoints of one run folder, used as a context manager. Saves are asynchronous and atomic.

    Args:
      folder: where they lie; made if needed.
      meta: what the run is (base, method, settings); a checkpoint of another run is refused.
      keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], *, keep: int = 2):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every file it writes
        import orbax.checkpoint as ocp

        self._ocp, self.folder, self.meta = ocp, folder, dict(meta)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with self._writing():
                self._manager.wait_until_finished()
                self._manager.close()
        except OSError:
            if error is None:  # else it is known
                raise

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def save(self, state: State) -> None:
        """Saves under `state.step`; returns once the values are copied, so `state` may be donated at once."""
        step = int(state.step)
        if step == self.latest:
            return
        args = self._ocp.args
        with self._writing():
            self._manager.save(
                step,
                args=args.Composite(
                    **{name: args.StandardSave(part) for name, part in _parts(state).items()},
                    meta=args.JsonSave(self.meta),
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
        args = self._ocp.args
        try:
            meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        except Exception as error:
            raise ValueError(self._damaged(step, error)) from error
        for name in sorted(self.meta.keys() | meta.keys()) if check else ():
            if self.meta.get(name) != meta.get(name):
                raise ValueError(
                    f"the checkpoint in {self.folder} was made with {name}={meta.get(name)!r}, not "
                    f"{self.meta.get(name)!r}: resume with the same settings, or start anew in another output_dir"
                )
        target = jax.tree.map(_abstract, _parts(like))
        try:
            parts = args.Composite(**{name: args.StandardRestore(part) for name, part in target.items()})
            restored = self._manager.restore(step, args=parts)
            return State(**restored["state"], **({"memory": restored["memory"]} if "memory" in target else {}))
        except Exception as error:
            raise ValueError(self._damaged(step, error)) from error

    def _damaged(self, step: int, error: Exception) -> str:
        others = sorted(set(self._manager.all_steps()) - {step})
        return (
            f"the checkpoint of step {step} in {self.folder} is damaged or incomplete ({type(error).__name__}); "
            f"{f'delete its folder, and that of step {others[-1]} is the newest' if others else 'there is no other'}"
        )


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
            found = checkpointer.restore(folder.absolute(), args=ocp.args.Composite(**parts))
        except Exception as error:
            raise ValueError(f"the checkpoint in {folder} is damaged or incomplete ({type(error).__name__})") from error
    return dict(found["params"]), dict(found["meta"])


@contextlib.contextmanager
def _checkpointer() -> Iterator[tuple[Any, Any]]:
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every file it writes
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        yield ocp, checkpointer


def _parts(state: State) -> dict[str, Any]:
    """A state as what lies in folders of its own. A method's memory is one only where there is any, so that runs
    without look as they always did, and so that the weights can be read without knowing what else was kept."""
    fields = state._asdict()
    memory = fields.pop("memory")
    return {"state": fields, **({"memory": memory} if jax.tree.leaves(memory) else {})}


def _abstract(array: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = array.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
