"""LoRA files: what an erasure changed, as products of thin matrices that diffusers, A1111 and ComfyUI add to a model.

    W + s B A,    A [rank, inputs], B [outputs, rank]              (Hu et al. 2021)

A convolution's kernel is taken as one matrix [outputs, inputs * height * width]: A is a convolution of its size, B one
of 1x1. The factors are the change's truncated singular value decomposition, the nearest of their rank (Eckart & Young
1936).

Every module's scale is explicit, because loaders guess it wrong where ranks differ: diffusers took the first
module's rank for every alpha until August 2026 (its pull request 14409), so PEFT's files carry their `LoraConfig`. Of
kohya's files it loses the alphas of attention layers, and 0.32 takes a module's rank for its alpha once ranks differ.
So all factors in a kohya file have one rank, the greatest that any matrix needs: zeros fill the others up, and alpha is
that rank, which makes the scale 1 however it is guessed.

kohya names FLUX.1's modules after the single file, which keeps several under one key. Their factors are stacked, and B
has them on its diagonal: the sum of the ranks is the rank, and nothing is lost. diffusers takes them apart again.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from esd_jax import lora
from esd_jax.inputs import expanded
from esd_jax.io import folder as files
from esd_jax.io import ldm, lora_kohya, safetensors, tensors
from esd_jax.io.exact import of_files, read_exact
from esd_jax.pipeline import Pipeline
from esd_jax.results import writing

STYLES = ("diffusers", "kohya")
ENERGY = 0.99  # of a change, which is kept by default
PEFT = "lora_adapter_metadata"  # where diffusers keeps a file's `LoraConfig`, as JSON
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # of a text encoder, those that loaders adapt


@dataclass(frozen=True)
class LoraReport:
    """What a LoRA carries.

    path: the file. ranks: "unet/NAME" -> (the rank of its change in the file, its greatest possible one).
    padded: the rank to which zeros fill all factors up; 0 if each has its own.
    kept: "unet/NAME" -> the share of the matrix's change that the file has, as a sum of squares.
    residual: |change - what the file makes of it|^2 / |change|^2 over everything that was edited.
    left_out: the edited tensors that the format cannot carry; they are part of the residual.
    """

    path: Path
    residual: float
    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    padded: int = 0

    def __str__(self) -> str:
        ranks = [rank for rank, _ in self.ranks.values()]
        span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        padded = f", written as {self.padded}" if self.padded > min(ranks) else ""
        text = f"rank {span} in {len(ranks)} matrices{padded}, {1 - self.residual:.4%} of the change"
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
    trained: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> LoraReport:
    """Writes the change of an erased checkpoint, its UNet's and its text encoders', as a LoRA.

    Args:
      pipeline: an erased checkpoint, and the files that it was before.
      path: the file to write, "....safetensors".
      rank: of every matrix, or less where a matrix has less (in "kohya" zeros then fill it up).
      energy: in place of `rank`: of each matrix the least rank that keeps such a share of its change (as a sum of
        squares), 0 to 1; 0.99 if neither is given.
      style: "diffusers" (PEFT's keys, for `load_lora_weights`), or "kohya" (for A1111 and ComfyUI; its modules are
        named as kohya's trainer names them: by diffusers in SD 1 and SD 2, by the single file in SDXL and FLUX.1).
      biases: carry them, which "diffusers" can ("lora_B.bias"), and "kohya" cannot. PEFT then cannot fuse the file into
        a model whose adapted layers do not all have one.
      dtype: of the factors.
      trained: in place of `rank` and `energy`: the factors whose product the change is (`esd_jax.lora`), JAX layout.
      overwrite: lets a file at `path` be replaced.
      metadata: more metadata than the records of what was erased.

    Raises:
      ValueError: no matrix of it is edited; a number out of range; or `path` is taken.
      OSError: one line: no permission, no space left, ...
    """
    path, code = expanded(path), safetensors.CODES[safetensors.read_dtype(dtype)]
    _check(pipeline, path, rank, energy, style, overwrite)
    base, modules = of_files(pipeline), _module_names(pipeline, style)
    matrices = {name.removesuffix(".weight"): name for name in sorted(pipeline.edits)}
    matrices = {module: name for module, name in matrices.items() if name.endswith(".weight") and module in modules}
    if not matrices:
        others = [name for name in sorted(pipeline.edits) if _network(name) != pipeline.denoiser]
        first = others[0] if others else min(pipeline.edits)
        raise ValueError(
            f"{first} is edited, and a LoRA carries matrices of the {pipeline.denoiser} and of CLIP's layers alone: "
            f"export {'' if others else 'a difference, or '}the whole folder"
        )
    vectors = {f"{module}.bias" for module in matrices} & pipeline.edits.keys()
    vectors = vectors if biases and style == "diffusers" else set()
    biased = {_network(name) for name in vectors}  # PEFT gives every adapted layer of a network a bias, or none
    written: dict[str, np.ndarray] = {}
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    ranks, kept, lost, total = {}, {}, 0.0, 0.0
    for module, name in matrices.items():
        change = _change(pipeline, base, name)
        flat = change.reshape(len(change), -1)
        down, up = factors(flat, rank, energy) if trained is None else _trained(trained, name, change.shape)
        down, up = (_rounded(name, part, code) for part in (down, up))
        missing = _energy(flat - _product(up, down))
        ranks[name], kept[name] = (len(down), min(flat.shape)), 1 - missing / (_energy(flat) or 1.0)
        lost, total = lost + missing, total + _energy(flat)
        pairs[module] = (
            down.reshape(-1, *change.shape[1:]),
            up.reshape(*up.shape, *(1,) * (change.ndim - 2)),
        )
        if _network(name) in biased:
            vector = f"{module}.bias"
            exact = _change(pipeline, base, vector) if vector in vectors else np.zeros(len(change))
            written[f"{modules[module]}.lora_B.bias"] = bias = _rounded(vector, exact, code)
            lost, total = lost + _energy(exact - bias.astype(np.float64)), total + _energy(exact)
    padded = max(rank for rank, _ in ranks.values()) if style == "kohya" else 0
    pairs |= lora_kohya.output_projections(pairs) if style == "kohya" else {}
    pairs = {
        module: (lora_kohya.filled(down, 0, padded), lora_kohya.filled(up, 1, padded))
        for module, (down, up) in pairs.items()
    }
    if style == "kohya" and ldm.is_flow(pipeline.configs):
        pairs, modules = lora_kohya.stacked(pipeline, pairs, modules)
    for module, (down, up) in pairs.items():
        down_key, up_key = _keys(modules[module], style)
        written[down_key], written[up_key] = down, up
        if style == "kohya":
            written[f"{modules[module]}.alpha"] = np.asarray(len(down), np.float32)
    left_out = tuple(sorted(pipeline.edits.keys() - set(matrices.values()) - vectors))
    for name in left_out:
        energy_of = _energy(_change(pipeline, base, name))
        lost, total = lost + energy_of, total + energy_of
    report = LoraReport(path, lost / total if total else 0.0, ranks, kept, left_out, padded)
    records = {**files.write_records(pipeline.provenance.erased), **_described(pipeline, report), **(metadata or {})}
    if style == "diffusers":
        records = {PEFT: json.dumps(_peft_config(ranks, biased)), **records}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.save(path, written, records)
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
    if rank is None and not squares.any():
        rank = 1
    elif rank is None:
        share = np.cumsum(squares) / squares.sum()
        rank = int(np.searchsorted(share, ENERGY if energy is None else energy) + 1)
    basis = basis[:, : min(rank, basis.shape[1])]
    inner = basis.T @ side
    # Shared between the factors, so that neither falls out of float16's range.
    scale = np.sqrt(np.maximum(np.linalg.norm(inner, axis=1), np.finfo(float).tiny))
    basis, inner = basis * scale, inner / scale[:, None]
    return (inner, basis) if wide else (basis.T, inner.T)


def _trained(
    theta: Mapping[str, Any], name: str, shape: tuple[int, ...]
) -> tuple[Float[np.ndarray, "rank inputs"], Float[np.ndarray, "outputs rank"]]:
    """(A, B) in torch layout, of a change of torch shape `shape`, of which training has a kernel's channels last."""
    down, up = (np.asarray(theta[name + end], np.float64).T for end in (lora.A, lora.B))
    if len(shape) == 4:
        down = down.reshape(len(down), *shape[2:], shape[1]).transpose(0, 3, 1, 2).reshape(len(down), -1)
    return down, up


def _network(name: str) -> str:
    return name.partition("/")[0]


def _change(pipeline: Pipeline, base: Pipeline, name: str) -> np.ndarray:
    """What was added to an edited tensor, float64 in torch layout."""
    network, _, tensor = name.partition("/")
    before = np.asarray(read_exact(base, [name])[name], np.float64)
    change = np.asarray(pipeline.edits[name], np.float64) - before
    return safetensors.to_file(change, pipeline.network(network).layouts[tensor])


def _energy(array: np.ndarray) -> float:
    return float(np.sum(np.square(array)))


def _product(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    return up.astype(np.float64) @ down.astype(np.float64)


def _rounded(name: str, array: np.ndarray, code: str) -> np.ndarray:
    return safetensors.cast(name, array.astype(np.float32), code)


def _keys(module: str, style: str) -> tuple[str, str]:
    down, up = ("lora_A", "lora_B") if style == "diffusers" else ("lora_down", "lora_up")
    return f"{module}.{down}.weight", f"{module}.{up}.weight"


def _module_names(pipeline: Pipeline, style: str) -> dict[str, str]:
    """ "unet/MODULE" -> what a style calls it, of every module that it can carry.

    Of kohya's names of FLUX.1, `lora_kohya.stacked` gives the right ones.
    """
    denoiser = pipeline.denoiser
    networks = {name: pipeline.network(name).layouts for name in (denoiser, *pipeline.text_encoders)}
    modules = {
        (network, name.rpartition(".")[0])
        for network, layouts in networks.items()
        for name, layout in layouts.items()
        if layout in ("linear", "conv") and (network == denoiser or name.split(".")[-2] in TEXT_LAYERS)
    }
    full = {(n, module): module if n == denoiser else f"text_model.{module}" for n, module in modules}
    if style == "diffusers":
        return {f"{n}/{module}": f"{n}.{full[n, module]}" for n, module in modules}
    two = len(pipeline.text_encoders) > 1
    if two and not ldm.is_flow(pipeline.configs):
        for name, place in ldm.places({denoiser: pipeline.configs[denoiser]}).items():
            inner = place.key.removeprefix(ldm.UNET).rpartition(".")[0]
            full[denoiser, name.partition("/")[2].rpartition(".")[0]] = inner
    prefixes = {
        denoiser: "lora_unet_", "text_encoder": "lora_te1_" if two else "lora_te_", "text_encoder_2": "lora_te2_",
    }  # fmt: skip
    return {f"{n}/{module}": prefixes[n] + full[n, module].replace(".", "_") for n, module in modules}


def _peft_config(ranks: Mapping[str, tuple[int, int]], biased: Iterable[str]) -> dict[str, Any]:
    """The `LoraConfig` of each network, under names that begin with "unet.", as diffusers writes it."""
    config: dict[str, Any] = {}
    for network in sorted({_network(name) for name in ranks}):
        # A text encoder's modules begin with "text_model." in some versions of transformers; PEFT compares endings.
        own = {name.removeprefix(f"{network}/").removesuffix(".weight"): rank for name, (rank, _) in ranks.items()
               if _network(name) == network}  # fmt: skip
        usual = Counter(own.values()).most_common(1)[0][0]
        other = {module: rank for module, rank in own.items() if rank != usual}
        fields = {"r": usual, "lora_alpha": usual, "rank_pattern": other, "alpha_pattern": other}
        fields |= {"target_modules": list(own), "lora_bias": network in biased}
        config |= {f"{network}.{field}": value for field, value in fields.items()}
    return config


def _described(pipeline: Pipeline, report: LoraReport) -> dict[str, str]:
    """The file's description, and the names of its base by which A1111 lists it among those that fit."""
    described = {"residual": report.residual, "left_out": list(report.left_out)}
    described |= {"ranks": {name: rank for name, (rank, _) in report.ranks.items()}}
    if ldm.is_flow(pipeline.configs):
        version = {"FluxPipeline": "flux1", "StableDiffusion3Pipeline": "sd3", "Flux2KleinPipeline": "flux2"}[
            pipeline.family.pipeline
        ]
        return {"esd_jax.lora": json.dumps(described), "ss_base_model_version": version}
    second = ldm.is_open_clip(pipeline.configs["text_encoder"])
    version = f"sd_v{1 + second}" + ("_v" if pipeline.schedule.prediction_type == "v_prediction" else "")
    if len(pipeline.text_encoders) == 2:
        second, version = False, "sdxl_base_v1-0"
    kohya = {"ss_network_module": "networks.lora", "ss_base_model_version": version, "ss_v2": str(second)}
    return {"esd_jax.lora": json.dumps(described), **kohya}


def _check(pipeline: Pipeline, path: Path, rank: int | None, energy: float | None, style: str, overwrite: bool) -> None:
    tensors.check_file(pipeline, path, "a LoRA", overwrite)
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown; choose one of {', '.join(STYLES)}")
    if style == "kohya":
        pipeline.family.require({"kohya_names"}, "style='kohya'")
    if rank is not None and energy is not None:
        raise ValueError("rank and energy both set how much is retained: set one of them")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy} must be above 0 and at most 1")
    if not pipeline.edits:
        raise ValueError("no tensor is edited, so there is no LoRA to write")
    tensors.check_edits(pipeline)
