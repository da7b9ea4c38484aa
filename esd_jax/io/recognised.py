"""What a safetensors file that its reader refuses seems to be, naming the reader that takes it."""

from collections.abc import Iterable

LORA = (".lora_", "lora_unet_", "lora_te", "lycoris_", ".hada_", ".lokr_", "_lora.up.", "_lora.down.")
EMBEDDING = ("emb_params", "clip_l", "clip_g", "clip_h")
CHECKPOINT = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.", "model_ema.")
UNET = (
    "conv_in.",
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "time_embedding.",
    "conv_norm_out.",
    "conv_out.",
    "unet.",
)
NETWORK = ("encoder.", "text_model.", "decoder.", "quant_conv.", "post_quant_conv.")
BARE = ("input_blocks.", "output_blocks.", "diffusion_model.")
# Names at the top of FLUX's and SD3's transformers, as diffusers has them; then in single files.
FLOW = (
    "transformer_blocks.",
    "single_transformer_blocks.",
    "context_embedder.",
    "time_text_embed.",
    "time_guidance_embed.",
    "double_stream_modulation_",
    "single_stream_modulation.",
    "x_embedder.",
    "norm_out.",
    "proj_out.",
)
OTHERS = ("double_blocks.", "joint_blocks.")
LOAD = "it is a single-file checkpoint: load it"
DELTA = "it holds UNet tensors alone: of a delta, name its base, too; of a diffusers folder, give the folder"
DELTAS = (DELTA, DELTA.replace("UNet", "transformer"))


def described(keys: Iterable[str]) -> str:
    """ "it is ..., which ... reads", or "" for what is not known."""
    keys = list(keys)
    if any(part in key for key in keys for part in LORA):
        return "it is a LoRA, a change to a checkpoint: merge it into one (export --merge, merge_lora)"
    if any(key in EMBEDDING or ".string_to_param." in key for key in keys) or (len(keys) == 1 and "." not in keys[0]):
        return "it is a textual inversion, vectors of a word: formats.add_embedding reads it"
    if any(key.startswith("control_model.") or "controlnet" in key for key in keys):
        return "it is a ControlNet, which stays beside a checkpoint"
    if any(part in key for key in keys for part in OTHERS):
        return (
            "it is a part of a transformer (FLUX.1, SD 3, ...): merge its shards, or download it again; or it is a "
            "relative of these that is not implemented"
        )
    if any(key.startswith(CHECKPOINT) for key in keys):
        return LOAD
    if any(key.startswith(BARE) for key in keys):
        return "it is a UNet alone under the single file's names: give the whole checkpoint"
    if any(key.startswith(UNET) for key in keys):
        return DELTAS[0]
    if any(key.startswith(FLOW) for key in keys):
        return DELTAS[1]
    if any(key.startswith(NETWORK) for key in keys):
        return "it is one network of a diffusers folder: give that folder, which holds model_index.json"
    return ""
