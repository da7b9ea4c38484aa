"""NVIDIA GPUs that are not there: a description of each, for which XLA compiles on any machine with its CUDA plugin.

    pip install 'esd-jax[cuda-aot]'      # of 142 MB; no driver, CUDA toolkit, cuDNN or GPU

cards.json holds the makers' figures. XLA's own description of a card that is here, which `launch.device_check` saves,
can be named in place of one: --topology=target_config.txtpb:1.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

CARDS = json.loads((Path(__file__).parent / "cards.json").read_text("utf-8"))
CUDNN = (9, 13, 0)  # from which heads of all sizes have their kernels

_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {ghz}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  device_vendor: "NVIDIA Corporation"
  name: "{name}"
  device_address_bits: 64
  ecc_enabled: true
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "{cudnn}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {dnn[0]} minor: {dnn[1]} patch: {dnn[2]} }}
device_description_str: "{name}"
"""


@dataclass(frozen=True)
class Cards:
    """So many of one kind of GPU in one host.

    target: XLA's description of it (`GpuTargetConfigProto` as text). capability: (9, 0) for an H100.
    """

    target: str
    capability: tuple[int, int]
    count: int = 1

    def devices(self) -> list[Any]:
        """JAX's devices, to compile for. Raises ValueError where XLA's CUDA plugin is missing."""
        from jax.experimental import topologies

        try:
            shape = f"1x1x{self.count}"
            described = topologies.get_topology_desc(platform="cuda", topology=shape, target_config=self.target)
        except Exception as error:  # JAX's own, of several kinds
            raise ValueError(
                f"cannot compile for a GPU that is not here ({' '.join(str(error).split())[:200]}): "
                "this needs pip install 'esd-jax[cuda-aot]'"
            ) from error
        return list(described.devices)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """What is traced meanwhile finds this GPU and its cuDNN, where JAX asks for those of this machine."""
        from jax._src.cudnn import fused_attention_stablehlo as asked

        from esd_jax.models import attention

        version = CUDNN[0] * 10000 + CUDNN[1] * 100 + CUDNN[2]
        named = ".".join(map(str, self.capability))
        with (
            mock.patch.object(asked, "check_cudnn_version", lambda: version),
            mock.patch.object(asked, "check_compute_capability", lambda least: self.capability >= _pair(least)),
            mock.patch.object(asked, "is_cuda_compute_capability_equal", lambda one: one == named),
            mock.patch.object(attention, "cudnn_version", lambda: version),
        ):
            yield


def named(topology: str) -> Cards | None:
    """The GPUs of "h100", "h100:4" or "target_config.txtpb:1"; None if it names none.

    Raises ValueError for a number of them that is none, and OSError for a file that cannot be read.
    """
    kind, _, count = topology.partition(":")
    if kind not in CARDS and not kind.endswith(".txtpb"):
        return None
    if not (count or "1").isdigit() or int(count or 1) < 1:
        raise ValueError(f"--topology={topology}: give how many GPUs, as in {kind}:4")
    if kind in CARDS:
        target, capability = _described(**CARDS[kind])
    else:
        target = Path(kind).read_text("utf-8")
        numbers = [_field(target, name) for name in ("major", "minor")]
        capability = numbers[0], numbers[1]
    return Cards(target, capability, int(count or 1))


def _described(capability: str, shared: int, **figures: Any) -> tuple[str, tuple[int, int]]:
    """A card's description from its row in cards.json."""
    pair = _pair(capability.removesuffix("a"))
    extension = "ACCELERATED_FEATURES" if capability.endswith("a") else "NONE"
    target = _TARGET.format(
        **figures, shared=shared, optin=shared - 1024, major=pair[0], minor=pair[1], extension=extension,
        dnn=CUDNN, cudnn=".".join(map(str, CUDNN)),
    )  # fmt: skip
    return target, pair


def _pair(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return int(major), int(minor or 0)


def _field(target: str, name: str) -> int:
    """A number in `cuda_compute_capability` of XLA's description; 0, which the text leaves out, if absent."""
    inside = re.search(r"cuda_compute_capability\s*\{([^}]*)\}", target)
    match = re.search(rf"{name}:\s*(\d+)", inside[1]) if inside else None
    return int(match[1]) if match else 0
