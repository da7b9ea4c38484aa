"""JAX's compilation cache: what one process compiled, the next one reads, on the command line and in Python.

The programs lie in ~/.cache/esd_jax/xla (or below $XDG_CACHE_HOME). JAX_COMPILATION_CACHE_DIR names another folder,
and ESD_JAX_COMPILATION_CACHE=0 keeps none.
"""

import contextlib
import functools
import os
from pathlib import Path

from esd_jax.inputs import cache

SWITCH = "ESD_JAX_COMPILATION_CACHE"


@functools.cache  # once: what a user sets afterwards stays
def use() -> None:
    """Lets JAX keep what it compiles, unless the user named a folder for it or wants none.

    The verbs of the package call it before anything is compiled. Where the folder cannot be written, nothing is kept:
    JAX would warn of each program.
    """
    if not (folder := wanted()):
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        keep_in(folder)


def wanted() -> Path | None:
    """The folder for JAX to keep programs in; None if the user named another one or wants none, or has no home."""
    import jax

    configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    if configured or os.environ.get(SWITCH, "").lower() in ("0", "false", "no", "off"):
        return None
    try:
        return cache("xla")
    except ValueError:
        return None


def keep_in(folder: Path) -> None:
    """Lets JAX keep programs in a folder, which it creates when there is something to keep."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
