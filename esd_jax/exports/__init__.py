"""An erased checkpoint written in the formats that people use, and read again to see that it is what memory holds."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esd_jax.erasure import texts_of
from esd_jax.exports import orbax, verifying
from esd_jax.exports.orbax import is_taken
from esd_jax.inputs import expanded
from esd_jax.io import delta, difference, diffusers, flow_file, ldm, leftovers, lora, lora_merge, single_file
from esd_jax.io import folder as files
from esd_jax.io.folder import variant_of
from esd_jax.io.safetensors import read_header
from esd_jax.pipeline import Pipeline
from esd_jax.suggest import did_you_mean


@dataclass(frozen=True)
class Format:
    """One form in which a checkpoint is written.

    what: it, in words. options: what `write` takes besides `overwrite` and `metadata`.
    write: (pipeline, path, **options) -> the path, or what could not be carried.
    read: (the base, path) -> the pipeline that a user of the file has.
    ending: of the file's name, after the checkpoint's.
    whole: whether it holds the whole checkpoint, not the change alone.
    exact: whether it carries every trained tensor, rounded to the file's dtype.
    alone: whether it holds the denoiser's tensors alone.
    needs: what the model family must provide (`families.NEEDS`).
    """

    what: str
    write: Callable[..., Any]
    read: Callable[[Pipeline, Path], Pipeline]
    ending: str
    options: tuple[str, ...] = ()
    whole: bool = False
    exact: bool = True
    alone: bool = False
    needs: frozenset[str] = frozenset()


def _load(base: Pipeline, path: Path) -> Pipeline:
    variants = {variant_of(file.name) for file in (path / base.denoiser).iterdir()} - {None}
    return diffusers.load(path, dtype=base.dtype, variant=next(iter(variants), None) or None)


def _load_single(base: Pipeline, path: Path) -> Pipeline:
    """With what the base's file needed to be read, or its folder: the file's own schedule then counts."""
    origin = base.provenance
    return diffusers.load(path, dtype=base.dtype, config=origin.config if origin.file else origin.folder)


def _lora(style: str) -> Callable[..., Any]:
    return lambda pipeline, path, **options: lora.export_lora(pipeline, path, style=style, **options)


FORMATS: Mapping[str, Format] = {
    "folder": Format(
        "diffusers folder", diffusers.export, _load, "", options=("max_shard_size", "variant"), whole=True
    ),
    "single": Format(
        "single file for A1111 and ComfyUI", single_file.export_single, _load_single, ".safetensors",
        options=("into", "dtype", "alone"), whole=True, needs=frozenset({"single_file"}),
    ),
    "delta": Format(
        "ESD delta: the trained tensors", delta.export_delta, delta.load_delta, "-delta.safetensors",
        options=("dtype",), alone=True,
    ),
    "difference": Format(
        "difference to the base, with a strength knob", difference.export_difference, difference.apply_difference,
        "-difference.safetensors", options=("dtype",), exact=False, alone=True,
    ),
    "lora": Format(
        "LoRA for diffusers (of a UNet's, ComfyUI ignores its attention layers: give it kohya's)", _lora("diffusers"),
        lora_merge.merge_lora, "-lora.safetensors",
        options=("rank", "energy", "dtype"), exact=False, needs=frozenset({"lora_names"}),
    ),
    "kohya": Format(
        "LoRA of kohya's keys, for A1111 and ComfyUI", _lora("kohya"), lora_merge.merge_lora, "-lora-kohya.safetensors",
        options=("rank", "energy", "dtype"), exact=False, needs=frozenset({"kohya_names"}),
    ),
    "orbax": Format("Orbax tree of the denoiser", orbax.write, orbax.read, "-orbax", alone=True),
}  # fmt: skip


# The same of FLUX and SD3: A1111 opens no FLUX, and ComfyUI reads diffusers' LoRA files of both.
OF_FLOWS = {
    "single": "single file for ComfyUI",
    "lora": "LoRA for diffusers",
    "kohya": "LoRA of kohya's keys, for ComfyUI",
}
ALONE = "single file of the transformer alone, for ComfyUI's models/diffusion_models"


@dataclass(frozen=True)
class Written:
    """What was written, and the comparison with what is read again.

    carried: the share of the change, as a sum of squares, that the file has: 1 - |memory - file|^2 / |change|^2.
    dtypes: in which the trained tensors lie; empty for a format that holds something else.
    changed, others: how many tensors were compared: the trained ones, and those that must be as they were.
    levels: the greatest difference, of 255, between the images that memory and the file draw.
    report: the writer's own words about what it could not carry.
    what: the format, in words.
    """

    format: str
    path: Path
    carried: float | None = None
    dtypes: tuple[str, ...] = ()
    changed: int = 0
    others: int = 0
    levels: int | None = None
    report: str = ""
    what: str = ""

    def __str__(self) -> str:
        lines = [f"{self.path}  {self.what or FORMATS[self.format].what}, {_size(self.path)}"]
        if self.carried is not None:
            kept = f", {self.others} others as they were" if self.others else ""
            within = f" in {' and '.join(self.dtypes)}" if self.dtypes else ""
            if self.carried < 0.9999:
                within += f", {self.carried:.2%} of the change"
            image = f"; the same image within {self.levels} of 255" if FORMATS[self.format].exact else ""
            image = image or f"; an image differs by up to {self.levels} of 255"
            lines.append(f"  verified: {self.changed} trained tensors{within}{kept}{image}")
        return "\n".join([*lines, *(f"  {line}" for line in self.report.splitlines())])


def export(
    pipeline: Pipeline,
    path: str | Path,
    format: str = "folder",
    *,
    verify: bool = False,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    **options: Any,
) -> Written:
    """Writes a checkpoint.

    Args:
      pipeline: an erased checkpoint.
      path: the folder or file.
      format: one of `FORMATS`.
      verify: read it again and compare; see `verified`.
      overwrite: lets what is at `path` be replaced.
      metadata: more metadata than the records of what was erased.
      **options: of the format: into, dtype, alone, rank, energy, max_shard_size, variant; see its writer.

    Raises:
      ValueError: an unknown format or option; whatever its writer refuses; or it is not what memory holds, in which
        case there is at `path` what was there before.
      OSError: one line: no permission, no space left, ...
    """
    path = expanded(path)
    kind = _format(format, pipeline)
    if unknown := sorted(name for name in options if name not in kind.options):
        fits = ", ".join(name for name, other in FORMATS.items() if unknown[0] in other.options)
        raise ValueError(f"format {format!r} takes no {unknown[0]}" + (f"; {fits} do" if fits else ""))

    def write() -> str:
        message = kind.write(pipeline, path, overwrite=overwrite, metadata=metadata, **options)
        return "" if isinstance(message, Path) else str(message)

    if not verify:
        return Written(format, path, report=write(), what=_what(pipeline, format, path))
    leftovers.sweep(path)
    before = leftovers.kept(path) if overwrite and _is_export(path) else None
    try:
        report = write()
        try:
            rest = {name: options.get(name) for name in ("dtype", "into") if kind.whole}
            return verified(pipeline, path, format, report, **rest)
        except BaseException:
            leftovers.remove(path)
            if before:
                before.rename(path)
            raise
    finally:
        if before:
            leftovers.remove(before)


def _is_export(path: Path) -> bool:
    """Whether a writer may replace what is at a path; it refuses all else, before it changes anything."""
    return path.is_file() or (path / "model_index.json").is_file() or (path / "params").is_dir()


def export_all(
    pipeline: Pipeline, folder: str | Path, formats: Iterable[str] = tuple(FORMATS), **options: Any
) -> list[Written]:
    """Writes a checkpoint in several formats into one folder, named after the base and what was erased.

    Args: as in `export`; each format takes those of the options that it knows.

    Raises: as `export`; before anything is written for what one of the formats, or all of the options, cannot do.
    """
    folder, stem, formats = expanded(folder), name_of(pipeline), tuple(formats)
    general = {name: options.pop(name) for name in ("verify", "overwrite", "metadata") if name in options}
    kinds = {name: _format(name, pipeline) for name in formats}
    if unknown := sorted(options.keys() - {option for kind in kinds.values() for option in kind.options}):
        raise ValueError(f"none of the formats {', '.join(formats)} takes {unknown[0]}")
    if others := sorted(name for name in pipeline.edits if not name.startswith(f"{pipeline.denoiser}/")):
        if narrow := [name for name in formats if kinds[name].alone]:
            fit = ", ".join(name for name in FORMATS if not FORMATS[name].alone)
            raise ValueError(
                f"{narrow[0]} holds {pipeline.denoiser} tensors alone, but {others[0]!r} is edited: choose among {fit}"
            )
    paths = {name: folder / f"{stem}{kind.ending}" for name, kind in kinds.items()}
    if not general.get("overwrite") and (taken := [path for path in paths.values() if is_taken(path)]):
        raise ValueError(f"{taken[0]} exists: pass overwrite=True to replace it, or choose another name")
    return [
        export(pipeline, path, name, **general, **{k: v for k, v in options.items() if k in kinds[name].options})
        for name, path in paths.items()
    ]


def possible(pipeline: Pipeline) -> tuple[str, ...]:
    """The formats that a checkpoint's family has."""
    return tuple(name for name, kind in FORMATS.items() if kind.needs <= pipeline.family.provides)


def name_of(pipeline: Pipeline) -> str:
    """The name of a checkpoint's files: "emoji-without-neon_style"."""
    texts = texts_of(pipeline.provenance.erased)
    base = Path(pipeline.provenance.source).name.removesuffix(".safetensors")
    concepts = "+".join(re.sub(r"[^\w-]+", "_", text.strip()) for text in texts) or "edited"
    return files.nameable(f"{base}-without-{concepts}".encode()[:180].decode(errors="ignore"))


def verified(
    pipeline: Pipeline,
    path: Path,
    format: str = "folder",
    report: str = "",
    dtype: Any = None,
    into: str | Path | None = None,
) -> Written:
    """Reads what was written, as its user would, and compares it with memory.

    Every trained tensor must be memory's in some dtype (of a difference or LoRA, the share of the change is given
    instead); every other tensor of a whole checkpoint must have the base's bits, under the base's dtype (or those of
    `into`, the file that it was written into, whose dtypes may be others), or be rounded to `dtype`, if all was written
    in one; no number may be NaN or infinite; the records of what was erased must be there; and of an exact format the
    image of one seed must be the one that memory draws when its tensors are rounded alike.

    Raises ValueError, naming the first thing that is wrong.
    """
    kind = _format(format, pipeline)
    how = {"whole": kind.whole, "exact": kind.exact, "dtype": dtype, "into": into}
    what = _what(pipeline, format, path)
    return Written(format, path, report=report, what=what, **verifying.compare(pipeline, path, kind.read, **how))


def _what(pipeline: Pipeline, format: str, path: Path) -> str:
    """A format in words, as they are true of a checkpoint's family."""
    if not ldm.is_flow(pipeline.configs):
        return FORMATS[format].what
    if format == "single" and flow_file.is_alone(read_header(path)):
        return ALONE
    return OF_FLOWS.get(format, FORMATS[format].what)


def _format(name: str, pipeline: Pipeline) -> Format:
    """A format by its name. Raises ValueError for an unknown one, and for one that the family has not."""
    if name not in FORMATS:
        raise ValueError(f"format={name!r} is unknown; {did_you_mean(name, FORMATS)}")
    pipeline.family.require(FORMATS[name].needs, f"format {name!r}")
    return FORMATS[name]


def _size(path: Path) -> str:
    size = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((pair for pair in units if size >= pair[0]), units[-1])
    return f"{size / unit:.3g} {name}"
