"""A workflow of ComfyUI, in its API format, that opens an exported checkpoint or LoRA and generates an image.

It is dropped onto ComfyUI's window, or sent to its /prompt. The files must lie where ComfyUI looks for them: a single
file in models/checkpoints, a LoRA in models/loras.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esd_jax import results
from esd_jax.evaluation import testbed
from esd_jax.exports import Written
from esd_jax.io.ldm import is_flow
from esd_jax.pipeline import Pipeline


def workflow(
    checkpoint: str,
    prompt: str,
    *,
    lora: str | None = None,
    strength: float = 1.0,
    negative_prompt: str = "",
    width: int = 512,
    height: int = 512,
    steps: int = 30,
    guidance_scale: float = 7.5,
    seed: int = 0,
) -> dict[str, Any]:
    """The nodes by their numbers.

    Args:
      checkpoint: the file's name in models/checkpoints: the erased single file, or the base that a LoRA goes with.
      lora: the name of a LoRA of kohya's keys in models/loras. strength: of both of its parts.
    """
    nodes: dict[str, Any] = {"1": _node("CheckpointLoaderSimple", ckpt_name=checkpoint)}
    model, clip = ["1", 0], ["1", 1]
    if lora is not None:
        nodes["2"] = _node(
            "LoraLoader", model=model, clip=clip, lora_name=lora, strength_model=strength, strength_clip=strength
        )
        model, clip = ["2", 0], ["2", 1]
    nodes |= {
        "3": _node("CLIPTextEncode", clip=clip, text=prompt),
        "4": _node("CLIPTextEncode", clip=clip, text=negative_prompt),
        "5": _node("EmptyLatentImage", width=width, height=height, batch_size=1),
        "6": _node(
            "KSampler", model=model, positive=["3", 0], negative=["4", 0], latent_image=["5", 0], seed=seed,
            steps=steps, cfg=guidance_scale, sampler_name="dpmpp_2m", scheduler="karras", denoise=1.0,
        ),
        "7": _node("VAEDecode", samples=["6", 0], vae=["1", 2]),
        "8": _node("SaveImage", images=["7", 0], filename_prefix="esd_jax"),
    }  # fmt: skip
    return nodes


def check(pipeline: Pipeline) -> None:
    """Raises ValueError for FLUX and SD3, whose graphs have other nodes."""
    if is_flow(pipeline.configs):
        raise ValueError(f"no ComfyUI workflow is written for {pipeline.family.name}: leave --workflow out")


def of_exports(pipeline: Pipeline, written: Sequence[Written], prompt: str) -> Path:
    """Writes a workflow of the model's own size beside exported files: of the single file, else of the LoRA.

    A LoRA goes with the base's single file, whose name is the user's: the node says BASE.safetensors.

    Raises ValueError without such a file, and as `check` does.
    """
    check(pipeline)
    files = {one.format: one.path for one in written}
    if not (file := files.get("single") or files.get("kohya")):
        raise ValueError("a ComfyUI workflow needs a single file or a LoRA of kohya's names: --format=single, or kohya")
    bed = testbed.of(pipeline.provenance.source)
    own = {"steps": bed.sampling["num_steps"], "guidance_scale": bed.sampling["guidance_scale"]} if bed else {}
    height, width = pipeline.family.default_size(pipeline.configs) or (512, 512)
    names = {"checkpoint": file.name} if "single" in files else {"checkpoint": "BASE.safetensors", "lora": file.name}
    return write(file.with_name("workflow.json"), prompt=prompt, **names, height=height, width=width, **own)


def write(path: Path, checkpoint: str, prompt: str, **options: Any) -> Path:
    """Writes `workflow` to a file. Returns the file."""
    with results.replacing(path) as partial:
        partial.write_text(json.dumps(workflow(checkpoint, prompt, **options), indent=2) + "\n", encoding="utf-8")
    return path


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
