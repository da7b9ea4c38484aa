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
    variables = {name: os.environ.get(name) for name in (COORDINATOR, COUNT, INDEX)}
    numbers: dict[str, Any] = {}
    if variables[COUNT] or variables[INDEX]:
        if missing := [name for name, value in variables.items() if not value]:
            raise ValueError(f"{missing[0]} is not set, though others of {', '.join(variables)} are")
        try:
            numbers = {"num_processes": int(variables[COUNT] or ""), "process_id": int(variables[INDEX] or "")}
        except ValueError:
            raise ValueError(f"{COUNT}={variables[COUNT]} and {INDEX}={variables[INDEX]} must be numbers") from None
    try:
        jax.distributed.initialize(variables[COORDINATOR], **numbers)
    except ValueError as error:
        raise ValueError(
            f"cannot tell which job this process belongs to: set {', '.join(variables)} ({error})"
        ) from error


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
    message, error = {}, None
    if is_primary():
        try:
            message = {"value": make()}
        except Exception as raised:
            message, error = {"error": str(raised)}, raised
    message = json.loads(_broadcast(json.dumps(message)))
    if error is not None:
        raise error
    if "error" in message:
        raise ValueError(f"the first process of this job failed: {message['error']}")
    return message["value"]


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
    """A text of the primary process, in all."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    data = data if is_primary() else np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(data)).decode()
