"""Every name that a LoRA file may have for a module.

Trainers name modules after diffusers, with dots (PEFT) or "_" (kohya, LyCORIS), after the single file, or as diffusers'
older versions did. So the names are derived from the networks' own, never parsed out of a file. A single file of FLUX.1
or SD3 keeps several modules under one key, and so do LoRA files that are named after it.
"""

from esd_jax.io import flow_names, ldm
from esd_jax.io.tensors import Place
from esd_jax.models.qwen3 import Qwen3Config
from esd_jax.models.t5 import T5Config
from esd_jax.pipeline import Pipeline

PEFT_PREFIXES = ("", "base_model.model.")
# "transformer/MODULE" and where it lies in what a file calls one module.
Parts = tuple[tuple[str, Place], ...]


def module_names(pipeline: Pipeline) -> dict[str, str]:
    """Every name that a file may have for a module -> "unet/MODULE"; of several under one key, "transformer/KEY"."""
    names: dict[str, str] = {}
    denoiser = pipeline.denoiser
    for component in (denoiser, *pipeline.text_encoders):
        for tensor in pipeline.network(component).shapes:
            module = tensor.rpartition(".")[0]
            if component == denoiser:
                written = _of_denoiser(denoiser, module)
            else:
                written = _of_text_encoder(pipeline, component, module, tensor.startswith("text_projection"))
            names |= dict.fromkeys(written, f"{component}/{module}")
    for module, parts in fused(pipeline).items():
        target = parts[0][0] if _is_whole(parts) else f"{denoiser}/{module}"
        written = (f"lora_unet_{module.replace('.', '_')}", f"lycoris_{module.replace('.', '_')}")
        inner = ("diffusion_model.", ldm.UNET, "transformer.", "")  # ComfyUI's own, and of those who train in its names
        for name in (*written, *(f"{prefix}{start}{module}" for prefix in PEFT_PREFIXES for start in inner)):
            names.setdefault(name, target)
    return names


def fused(pipeline: Pipeline) -> dict[str, Parts]:
    """What a single file calls each module of the denoiser -> those of ours that it holds, in their order.

    Norms, which no LoRA changes, are among them.
    """
    modules: dict[str, dict[str, Place]] = {}
    for name, place in ldm.places({pipeline.denoiser: pipeline.configs[pipeline.denoiser]}).items():
        key = place.key.removeprefix(ldm.UNET).rpartition(".")[0]
        modules.setdefault(key, {}).setdefault(name.rpartition(".")[0], place)
    return {
        key: tuple(sorted(parts.items(), key=lambda part: (part[1].rows or (0, 0))[0]))
        for key, parts in modules.items()
        if key
    }


def _is_whole(parts: Parts) -> bool:
    """Whether a module of a single file is one of ours as it is."""
    return len(parts) == 1 and not parts[0][1].swapped


def _of_denoiser(component: str, module: str) -> list[str]:
    flat = module.replace(".", "_")
    names = [f"{prefix}{network}{module}" for prefix in PEFT_PREFIXES for network in ("", f"{component}.")]
    # The older diffusers kept an attention's adapters in its processor, "attn2.processor.to_out_lora", and first
    # without saying of which network.
    head, _, projection = module.removesuffix(".0").rpartition(".")
    names += [f"{prefix}{head}.processor.{projection}" for prefix in ("", f"{component}.")]
    return [*names, f"lora_{component}_{flat}", f"lycoris_{flat}"]


def _of_text_encoder(pipeline: Pipeline, component: str, module: str, projection: bool) -> list[str]:
    config = pipeline.configs[component]
    t5, qwen3 = isinstance(config, T5Config), isinstance(config, Qwen3Config)
    full = module if projection or t5 or qwen3 else f"text_model.{module}"
    names = [f"{prefix}{component}.{known}" for prefix in PEFT_PREFIXES for known in (module, full)]
    if qwen3:
        return names
    flat, second = full.replace(".", "_"), component == "text_encoder_2"
    if t5:
        return [*names, f"lora_te3_{flat}", f"{flow_names.TEXT.format(flow_names.T5)}{full}"]
    # The older diffusers named its layers like a UNet's, "self_attn.to_q_lora".
    head, _, last = module.rpartition(".")
    names.append(f"{component}.text_model.{head}.to_{last.removesuffix('_proj')}")
    names += [f"{prefix}{flat}" for prefix in (("lora_te2_",) if second else ("lora_te_", "lora_te1_"))]
    clip = "clip_g" if second else "clip_h" if ldm.is_open_clip(config) else "clip_l"
    return [*names, f"text_encoders.{clip}.transformer.{full}"]  # ComfyUI's own
