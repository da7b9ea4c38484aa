"""What makes XLA up to twice as fast on a CPU; docs/performance.md has the measurements."""

import os
import sys
from importlib.metadata import version

# XLA hands convolutions and other operations to a library, YNNPACK, that is slower here than its own code (in the
# releases in which this was measured). This is the empty list of what it gets.
XLA_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
MEASURED = ("0.10.", "0.11.")
# Large buffers are kept and lie on large pages, instead of being mapped anew in every step.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def tuned() -> None:
    """Starts this program anew with these settings, unless they, or others in their place, are in the environment."""
    if sys.platform != "linux":
        return
    wanted = {name: value for name, value in MALLOC.items() if name not in os.environ}
    flags = os.environ.get("XLA_FLAGS", "")
    if version("jaxlib").startswith(MEASURED) and "xla_cpu_experimental_ynn_fusion_type" not in flags:
        wanted["XLA_FLAGS"] = f"{flags} {XLA_FLAG}".strip()
    if wanted:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)
