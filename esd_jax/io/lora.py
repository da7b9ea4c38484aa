"""LoRA files: what an erasure changed, as products of thin matrices that diffusers, A1111 and ComfyUI add to a model.

    W + s B A,    A [rank, inputs], B [outputs, rank]              (Hu et al. 2021)

A convolution's kernel is taken as one matrix [outputs, inputs * height * width]: A is a convolution of its size, B one
of 1x1. The factors are the change's truncated singular value decomposition, the nearest of their rank (Eckart & Young
1936).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from esd_jax.io import folder as files
from esd_jax.io import ldm, safetensors, tensors
from esd_jax.io.diffusers import read_exact, unmodified
from esd_jax.pipeline import Pipeline

STYLES = ("diffusers", "kohya")
ENERGY = 0.99  # of a change, which is kept by default


@dataclass(frozen=True)
class LoraReport:
    """What a LoRA carries.

    path: the file. ranks: "unet/NAME" -> (its rank in the file, its greatest possible one).
    kept: "unet/NAME" -> the share of the matrix's change that the file has, as a sum of squares.
    residual: |change - what the file makes of it|^2 / |change|^2 over everything that was edited.
    left_out: the edited tensors that the format cannot carry; they are part of the residual.
    """

    path: Path
    residual: float
    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        ranks = [rank for rank, _ in self.ranks.values()]
        span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        text = f"rank {span} in {len(ranks)} matrices, {1 - self.residual:.4%} of the change"
        if self.left_out:
            text += f"; not carried: {len(self.left_out)} tensors, first {self.left_out[0]}"
        return text


def export_lora(
    pipeline: Pipeline,
    path: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    style: str = "diffusers",
    biases: bool = True,
    dtype: Any = "float16",
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> LoraReport:
    """Writes the change of an erased UNet as a LoRA.

    Args:
      pipeline: an erased checkpoint, and files that say what it was before.
      path: the file to write, "....safetensors".
      rank: of every matrix, or less where a matrix has less.
      energy: in place of `rank`: of each matrix the least rank that keeps such a share of its change (as a sum of
        squares), 0 to 1; 0.99 if neither is given.
      style: "diffusers" (PEFT's keys, for `load_lora_weights`), or "kohya" (for A1111 and ComfyUI; its modules are
        named as kohya's trainer names them: by diffusers in SD 1 and SD 2, by the single file in SDXL).
      biases: carry them, which "diffusers" can ("lora_B.bias"), and "kohya" cannot. PEFT then cannot fuse the file into
        a model whose adapted layers do not all have one.
      dtype: of the factors.
      overwrite: lets a file at `path` be replaced.
      metadata: more metadata than the records of what was erased.

    Raises:
      ValueError: nothing in it is edited, or something besides the UNet; a number out of range; or `path` is taken.
      OSError: one line: no permission, no space left, ...
    """
    path, code = Path(path).expanduser(), safetensors.CODES[safetensors.read_dtype(dtype)]
    _check(pipeline, path, rank, energy, style, overwrite)
    net, base = pipeline.network("unet"), unmodified(pipeline)
    modules = _module_names(pipeline, style)
    written: dict[str, np.ndarray] = {}
    ranks, kept, left_out, lost, total = {}, {}, [], 0.0, 0.0
    changes: dict[str, np.ndarray] = {}
    matrices = {name for name in pipeline.edits if net.layouts[name.removeprefix("unet/")] in ("linear", "conv")}
    for name in sorted(pipeline.edits):
        tensor = name.removeprefix("unet/")
        change = np.asarray(pipeline.edits[name], np.float64) - np.asarray(read_exact(base, [name])[name], np.float64)
        change = safetensors.to_file(change, net.layouts[tensor])
        energy_of = float(np.sum(np.square(change)))
        total += energy_of
        module, _, leaf = tensor.rpartition(".")
        if name in matrices:
            down, up = (_rounded(name, part, code) for part in factors(change.reshape(len(change), -1), rank, energy))
            missing = float(np.sum(np.square(change.reshape(len(change), -1) - _product(up, down))))
            ranks[name] = (len(down), min(up.shape[0], down.shape[1]))
            kept[name] = 1 - missing / energy_of if energy_of else 1.0
            lost += missing
            outer = (1,) * (change.ndim - 2)
            shapes = ((len(down), *change.shape[1:]), (*up.shape, *outer))
            for key, part, shape in zip(_keys(modules[module], style), (down, up), shapes, strict=True):
                written[key] = part.reshape(shape)
            if style == "kohya":
                written[modules[module] + ".alpha"] = np.asarray(len(down), safetensors.DTYPES[code])
        elif leaf == "bias" and f"unet/{module}.weight" in matrices and style == "diffusers" and biases:
            changes[module] = change
        else:
            left_out.append(name)
            lost += energy_of
    if not ranks:
        raise ValueError("no matrix is edited, so there is no LoRA to write: export a difference, or the whole folder")
    if changes:  # PEFT gives every adapted layer a bias, or none
        for name in ranks:
            module = name.removeprefix("unet/").removesuffix(".weight")
            bias = changes.get(module, np.zeros(len(written[f"{modules[module]}.lora_B.weight"])))
            stored = _rounded(name, bias, code)
            lost += float(np.sum(np.square(bias - stored.astype(np.float64))))
            written[f"{modules[module]}.lora_B.bias"] = stored
    report = LoraReport(path, lost / total if total else 0.0, ranks, kept, tuple(left_out))
    told = {**files.write_records(pipeline.provenance.erased), **_described(report, style), **(metadata or {})}
    with safetensors.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.save(path, written, told)
    return report


def factors(
    change: Float[np.ndarray, "outputs inputs"], rank: int | None = None, energy: float | None = None
) -> tuple[Float[np.ndarray, "rank inputs"], Float[np.ndarray, "outputs rank"]]:
    """(A, B) with B A nearest to a change, float64: of a rank, or of the least rank that keeps a share of it.

    The singular vectors of the shorter side come from the Gram matrix, which is far cheaper for a wide kernel; the
    other factor is the change in their basis, so that at full rank nothing is lost but what rounding takes.
    """
    wide = change.shape[0] <= change.shape[1]
    side = change if wide else change.T
    squares, basis = np.linalg.eigh(side @ side.T)
    squares, basis = np.maximum(squares[::-1], 0), basis[:, ::-1]
    if rank is None:
        share = np.cumsum(squares) / max(float(squares.sum()), np.finfo(float).tiny)
        rank = int(np.searchsorted(share, ENERGY if energy is None else energy) + 1)
    basis = basis[:, : min(rank, basis.shape[1])]
    inner = basis.T @ side
    # Shared between the factors, so that neither falls out of float16's range.
    scale = np.sqrt(np.maximum(np.linalg.norm(inner, axis=1), np.finfo(float).tiny))
    basis, inner = basis * scale, inner / scale[:, None]
    return (inner, basis) if wide else (basis.T, inner.T)


def _product(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    return up.astype(np.float64) @ down.astype(np.float64)


def _rounded(name: str, array: np.ndarray, code: str) -> np.ndarray:
    return safetensors.cast(name, array.astype(np.float32), code)


def _keys(module: str, style: str) -> tuple[str, str]:
    down, up = ("lora_A", "lora_B") if style == "diffusers" else ("lora_down", "lora_up")
    return f"{module}.{down}.weight", f"{module}.{up}.weight"


def _module_names(pipeline: Pipeline, style: str) -> dict[str, str]:
    """diffusers' module -> what a style calls it."""
    names = [name.rpartition(".")[0] for name in pipeline.network("unet").shapes]
    if style == "diffusers":
        return {name: f"unet.{name}" for name in names}
    if len(pipeline.text_encoders) == 1:
        return {name: "lora_unet_" + name.replace(".", "_") for name in names}
    places = ldm.places({"unet": pipeline.configs["unet"]})
    return {
        name.removeprefix("unet/").rpartition(".")[0]: "lora_unet_"
        + place.key.removeprefix(ldm.UNET).rpartition(".")[0].replace(".", "_")
        for name, place in places.items()
    }


def _described(report: LoraReport, style: str) -> dict[str, str]:
    told = {"residual": report.residual, "left_out": list(report.left_out)}
    told |= {"ranks": {name: rank for name, (rank, _) in report.ranks.items()}}
    kohya = {"ss_network_module": "networks.lora", "ss_base_model_version": ""} if style == "kohya" else {}
    return {"esd_jax.lora": json.dumps(told), **kohya}


def _check(pipeline: Pipeline, path: Path, rank: int | None, energy: float | None, style: str, overwrite: bool) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a LoRA is a .safetensors file")
    if path.is_dir() or (path.exists() and not overwrite):
        raise ValueError(f"{path} exists: pass overwrite=True to replace the file, or choose another name")
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown; choose one of {', '.join(STYLES)}")
    if rank is not None and energy is not None:
        raise ValueError("rank and energy both say how much is kept: give one of them")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy} must be above 0 and at most 1")
    if others := sorted(name for name in pipeline.edits if not name.startswith("unet/")):
        raise ValueError(f"a LoRA holds the UNet's change alone, but {others[0]!r} is edited: export the whole folder")
    if not pipeline.edits:
        raise ValueError("no UNet tensor is edited, so there is no LoRA to write")
    tensors.check_edits(pipeline)
