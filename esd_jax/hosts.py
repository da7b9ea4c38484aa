"""Several processes, one on each host, that carry out one run together: joining them, and what only the primary does.

The processes compute the same program on one mesh over all their devices. Files are written by the primary one, but for
checkpoints, which all write together to a folder that all must see.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Read where JAX does not detect them by itself, as it does on TPU pods and under SLURM, Open MPI and Kubernetes.
COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join() -> None:
    """Joins this process to the others of its job; to be called before anything is computed.

    Raises ValueError if the job cannot be determined, and RuntimeError if the others do not come.
    """
    # A run stops at a step that all processes agree on (`preemption_consensus`); JAX's service would take SIGTERM away.
    jax.config.update("jax_enable_preemption_service", False)
    given = {name: os.environ.get(name) for name in (COORDINATOR, COUNT, INDEX)}
    told: dict[str, Any] = {}
    if given[COUNT] or given[INDEX]:
        if missing := [name for name, value in given.items() if not value]:
            raise ValueError(f"{missing[0]} is not set, though others of {', '.join(given)} are")
        try:
            told = {"num_processes": int(given[COUNT] or ""), "process_id": int(given[INDEX] or "")}
        except ValueError:
            raise ValueError(f"{COUNT}={given[COUNT]} and {INDEX}={given[INDEX]} must be numbers") from None
    try:
        jax.distributed.initialize(given[COORDINATOR], **told)
    except ValueError as error:
        raise ValueError(f"cannot tell which job this process belongs to: set {', '.join(given)} ({error})") from error


def is_primary() -> bool:
    """Whether this is the process that writes files and informs the user."""
    return jax.process_index() == 0


first = is_primary  # a former name


def agreed(make: Callable[[], Any]) -> Any:
    """What `make` returns in the primary process, as JSON holds it, in every process; or the error raised there.

    Other processes do not call it, and learn an error's message, not its type.
    """
    if jax.process_count() == 1:
        return make()
    told, error = {}, None
    if is_primary():
        try:
            told = {"value": make()}
        except Exception as raised:
            told, error = {"error": str(raised)}, raised
    told = json.loads(_broadcast(json.dumps(told)))
    if error is not None:
        raise error
    if "error" in told:
        raise ValueError(f"the first process of this job failed: {told['error']}")
    return told["value"]


def wait(what: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def preemption_consensus(step: Callable[..., tuple[Any, Any]], mesh: Mesh) -> Callable[..., tuple[Any, Any, Any]]:
    """A training step with one more argument, whether this process wants to stop, that also returns whether any does:

        state, metrics, asked = step(state, theta_0, frozen, inputs, signalled)
        ...
        if bool(asked): ...     # later: nobody waits, and every process gets the same answer to the same step

    The vote is part of the step's program: hosts may start two programs in different orders, and then each would wait
    for what the other does later.

    Args:
      step: `training.step.make_step`'s; its first argument is donated.
      mesh: one that spans the devices of all processes.
    """
    each, everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, donate_argnums=0)
    def program(state: Any, theta_0: Any, frozen: Any, inputs: Any, votes: Any) -> tuple[Any, Any, Any]:
        asked = jax.lax.with_sharding_constraint(votes.any(), everywhere)
        return *step(state, theta_0, frozen, inputs), asked

    def voted(state: Any, theta_0: Any, frozen: Any, inputs: Any, yes: bool) -> tuple[Any, Any, Any]:
        votes = jax.make_array_from_callback((mesh.size,), each, lambda _: np.asarray([yes]))
        return program(state, theta_0, frozen, inputs, votes)

    return voted


def _broadcast(text: str) -> str:
    """A text of the first process, in all."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    data = data if is_primary() else np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(data)).decode()
