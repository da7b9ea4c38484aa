"""JAX's compilation cache: what one process compiled, the next one reads, on the command line and in Python.

The programs lie in ~/.cache/esd_jax/xla (or below $XDG_CACHE_HOME). JAX_COMPILATION_CACHE_DIR names another folder,
and ESD_JAX_COMPILATION_CACHE=0 keeps none.
"""

import functools
import os

from esd_jax.inputs import cache

SWITCH = "ESD_JAX_COMPILATION_CACHE"


@functools.cache  # once: what a user sets afterwards stays
def use() -> None:
    """Lets JAX keep what it compiles, unless the user named a folder for it or wants none.

    The verbs of the package call it before anything is compiled. Where the folder cannot be written, nothing is kept.
    """
    import jax

    configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] (made at import)
    if configured or os.environ.get(SWITCH, "").lower() in ("0", "false", "no", "off"):
        return
    try:
        folder = cache("xla")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError):  # a read-only home, or none
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
