"""Settings that every test shares; they must stand before jax is imported."""

import os
from pathlib import Path

# Compiled programs are kept between runs: XLA compiles slowly on a CPU.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
