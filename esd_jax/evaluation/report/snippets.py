"""Code that uses an erasure's files in diffusers, ComfyUI, A1111 and esd_jax."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from esd_jax.evaluation.report.about import File, Use

# format -> (its folder in A1111's, in ComfyUI's, and ComfyUI's node)
PROGRAMS = {
    "single": ("models/Stable-diffusion", "models/checkpoints", "Load Checkpoint"),
    "kohya": ("models/Lora", "models/loras", "Load LoRA"),
}
BASE = "path/to/the/base"  # of a base that is no model of the hub: the report does not say where it lies
# One dtype for all parts, where transformers 5 leaves each as its file has it.
DEVICE = 'pipe.to("cuda", torch.float32)  # or "mps", "cpu"; torch.float16 takes half of the memory'
PLACES = {"emoji": "MODEL", "emoji-flow": "FLOW"}  # the package's own models -> their folders in `esd_jax.demo`
NOT_OPENED = "A1111 and ComfyUI do not know the architecture of this small model."


@dataclass(frozen=True)
class Source:
    """What code says of an erased model.

    prompt: that is sampled. base: the hub id of the base; None of one that lies elsewhere.
    folder: where the files lie, as seen from where the code runs. repo: the hub's repository that holds them, instead.
    pipeline: the diffusers class of the checkpoint. denoiser: that class's attribute for the network that is erased.
    sampling: steps and guidance_scale, where it needs its own.
    arguments: of the pipeline's call, where it does not take those two by these names.
    embedded: the name of the package's own model that is the base, one of `PLACES`.
    """

    prompt: str
    base: str | None = None
    folder: str = ""
    repo: str = ""
    pipeline: str = "StableDiffusionPipeline"
    denoiser: str = "unet"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    embedded: str = ""

    def path(self, file: str) -> str:
        """A file of the erased model, seen from where the code runs."""
        return str(PurePosixPath(self.folder, file))

    @property
    def call(self) -> str:
        """The code that samples from `pipe`."""
        arguments = self.arguments or {
            "num_inference_steps": self.sampling.get("steps"),
            "guidance_scale": self.sampling.get("guidance_scale"),
        }
        more = "".join(f", {name}={_written(value)}" for name, value in arguments.items() if value is not None)
        return f"{DEVICE}\nimage = pipe({_quoted(self.prompt)}{more}).images[0]"

    def on_base(self, *changed: str, imports: str = "") -> str:
        """The code that loads the base, changes it, and samples."""
        place = PLACES.get(self.embedded)
        mine = f"from esd_jax.demo import {place}\n" if place else ""
        base = place or _quoted(self.base or BASE)
        lines = "\n".join((f"pipe = DiffusionPipeline.from_pretrained({base})", *changed, self.call))
        return f"import torch\nfrom diffusers import DiffusionPipeline\n{mine}{imports}\n{lines}"


def uses(files: Iterable[File], source: Source) -> tuple[Use, ...]:
    """How the files that exist are used, whole checkpoints first. A file's format is one of `exports.FORMATS`."""
    named = {file.format: file.path for file in files if file.format}
    makers = (_folder, _single, _lora, _kohya, _delta, _difference)
    return tuple(use for make in makers if make.__name__[1:] in named for use in make(named, source))


def markdown(snippets: Sequence[Use]) -> str:
    """The same as Markdown."""
    return "\n\n".join(
        "\n\n".join(filter(None, [f"**{use.title}**", f"```{use.language}\n{use.code}\n```", use.note]))
        for use in snippets
    )


def _folder(named: Mapping[str, str], source: Source) -> Iterator[Use]:
    place = source.repo or source.path(named["folder"])
    load = f"pipe = DiffusionPipeline.from_pretrained({_quoted(place)})"
    note = NOT_OPENED if source.embedded else ""
    yield Use(
        "diffusers: the erased model",
        f"import torch\nfrom diffusers import DiffusionPipeline\n\n{load}\n{source.call}",
        note,
    )


def _single(named: Mapping[str, str], source: Source) -> Iterator[Use]:
    name = named["single"]
    place = f"https://huggingface.co/{source.repo}/blob/main/{name}" if source.repo else source.path(name)
    config = (source.repo or source.path(named["folder"])) if "folder" in named else ""
    more = f", config={_quoted(config)}" if config else ""
    load = f"pipe = {source.pipeline}.from_single_file({_quoted(place)}{more})"
    if not source.embedded:
        yield _programs("single", name, source)
    yield Use(
        "diffusers: the single file", f"import torch\nfrom diffusers import {source.pipeline}\n\n{load}\n{source.call}"
    )


def _lora(named: Mapping[str, str], source: Source, format: str = "lora") -> Iterator[Use]:
    file = PurePosixPath(source.path(named[format]))
    place = source.repo or str(file.parent)
    load = f"pipe.load_lora_weights({_quoted(place)}, weight_name={_quoted(file.name)})"
    yield Use("diffusers: the LoRA on the base", source.on_base(load), "Its weight is 1; less erases less.")


def _kohya(named: Mapping[str, str], source: Source) -> Iterator[Use]:
    if not source.embedded:
        yield _programs("kohya", named["kohya"], source)
    if "lora" not in named:
        yield from _lora(named, source, "kohya")


def _programs(format: str, name: str, source: Source) -> Use:
    a1111, comfyui, node = PROGRAMS[format]
    file, lora = PurePosixPath(name), format == "kohya"
    copies = [f"{program}/{place}/" for program, place in (("stable-diffusion-webui", a1111), ("ComfyUI", comfyui))]
    code = [
        f"hf download {source.repo} {shlex.quote(name)} --local-dir {place}"
        if source.repo
        else f"cp {shlex.quote(source.path(name))} {place}"
        for place in copies
    ]
    a1111 = f"A1111: write <lora:{file.stem}:1> in the prompt." if lora else f"A1111: choose {file.stem}."
    comfyui = f"ComfyUI: choose it in the node {node}{', with strength 1' if lora else ''}."
    title = f"A1111 and ComfyUI: the {'LoRA' if lora else 'single file'}"
    return Use(title, "\n".join(code), f"{a1111} {comfyui}", "bash")


def _delta(named: Mapping[str, str], source: Source) -> Iterator[Use]:
    place, imports = _quoted(source.path(named["delta"])), "from safetensors.torch import load_file\n"
    if source.repo:
        place = f"hf_hub_download({_quoted(source.repo)}, {_quoted(named['delta'])})"
        imports = f"from huggingface_hub import hf_hub_download\n{imports}"
    code = source.on_base(f"pipe.{source.denoiser}.load_state_dict(load_file({place}), strict=False)", imports=imports)
    yield Use("diffusers: the delta on the base", code, "It holds the changed tensors of the denoiser alone.")


def _difference(named: Mapping[str, str], source: Source) -> Iterator[Use]:
    base = source.embedded or source.base or BASE
    place, imports = _quoted(source.path(named["difference"])), ""
    if source.repo:
        place = f"hf_hub_download({_quoted(source.repo)}, {_quoted(named['difference'])})"
        imports = "from huggingface_hub import hf_hub_download\n"
    code = (
        f"import esd_jax\nfrom esd_jax import formats\n{imports}\n"
        f"erased = formats.apply_difference(esd_jax.load({_quoted(base)}), {place}, 1.0)  # 0.5: half of the change\n"
        f"image = esd_jax.sample(erased, {_quoted(source.prompt)})[0]"
    )
    yield Use("esd_jax: the difference, at any strength", code)


def _written(value: str | float) -> str:
    return _quoted(value) if isinstance(value, str) else f"{value:g}"


def _quoted(text: str) -> str:
    """A text as Python writes it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)
