"""Every name that a LoRA file may have for a module.

Trainers name modules after diffusers, with dots (PEFT) or "_" (kohya, LyCORIS), after the single file, or as diffusers'
older versions did. So the names are derived from the networks' own, never parsed out of a file.
"""

from esd_jax.io import ldm
from esd_jax.pipeline import Pipeline

PEFT_PREFIXES = ("", "base_model.model.")


def module_names(pipeline: Pipeline) -> dict[str, str]:
    """Every name that a file may have for a module -> "unet/MODULE"."""
    names: dict[str, str] = {}
    for component in ("unet", *pipeline.text_encoders):
        for tensor in pipeline.network(component).shapes:
            module = tensor.rpartition(".")[0]
            if component == "unet":
                written = _of_unet(module)
            else:
                written = _of_text_encoder(pipeline, component, module, tensor.startswith("text_projection"))
            names |= dict.fromkeys(written, f"{component}/{module}")
    for name, place in ldm.places({"unet": pipeline.configs["unet"]}).items():
        module, target = place.key.removeprefix(ldm.UNET).rpartition(".")[0], name.rpartition(".")[0]
        names.setdefault("lora_unet_" + module.replace(".", "_"), target)
        names.setdefault("diffusion_model." + module, target)  # ComfyUI's own, and of those who train in its names
    return names


def _of_unet(module: str) -> list[str]:
    flat = module.replace(".", "_")
    names = [f"{prefix}{network}{module}" for prefix in PEFT_PREFIXES for network in ("", "unet.")]
    # The older diffusers kept an attention's adapters in its processor, "attn2.processor.to_out_lora", and first
    # without saying of which network.
    head, _, projection = module.removesuffix(".0").rpartition(".")
    names += [f"{prefix}{head}.processor.{projection}" for prefix in ("", "unet.")]
    return [*names, f"lora_unet_{flat}", f"lycoris_{flat}"]


def _of_text_encoder(pipeline: Pipeline, component: str, module: str, projection: bool) -> list[str]:
    full = module if projection else f"text_model.{module}"
    names = [f"{prefix}{component}.{known}" for prefix in PEFT_PREFIXES for known in (module, full)]
    # The older diffusers named its layers like a UNet's, "self_attn.to_q_lora".
    head, _, last = module.rpartition(".")
    names.append(f"{component}.text_model.{head}.to_{last.removesuffix('_proj')}")
    flat, second = full.replace(".", "_"), component == "text_encoder_2"
    names += [f"{prefix}{flat}" for prefix in (("lora_te2_",) if second else ("lora_te_", "lora_te1_"))]
    clip = "clip_g" if second else "clip_h" if ldm.is_open_clip(pipeline.configs[component]) else "clip_l"
    return [*names, f"text_encoders.{clip}.transformer.{full}"]  # ComfyUI's own
