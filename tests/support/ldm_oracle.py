"""diffusers' own converters of single-file checkpoints, as what a file's keys and values are held against."""

import factories
import torch
from diffusers.loaders import single_file_utils as converters

OPEN_CLIP = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}


def make(family, folder, dtype=torch.float32, seed=0):
    """A tiny folder whose UNet says little, so that images can be compared; see `test_api.make_calm`.

    SDXL's second text encoder is wider than the first, by which diffusers tells them apart, and than its projection.
    """
    if family == "sdxl":
        sizes = {"cross_attention_dim": factories.WIDTH + 48, "projection_class_embeddings_input_dim": 6 * 8 + 40}
        pipe = factories.make_sdxl(folder, seed=seed, **sizes)
        pipe.text_encoder_2 = factories.make_text_encoder(hidden_act="gelu", hidden_size=48, projection_dim=40)
    else:
        pipe = {"sd1": factories.make_sd1, "sd2": factories.make_sd2}[family](folder, seed=seed)
    with torch.no_grad():
        for value in pipe.unet.conv_out.parameters():
            value.mul_(0.1)
    return factories.save(pipe, folder, dtype, "files")


def from_ldm(checkpoint, component, config, *, xl):
    """The tensors of one network under diffusers' names (text encoders without "text_model.").

    Args:
      checkpoint: key -> torch tensor, which may have no values ("meta").
      component: "unet", "vae", "text_encoder" or "text_encoder_2".
      config: the contents of its config.json.
      xl: whether the file is an SDXL.
    """
    if component == "unet":
        return converters.convert_ldm_unet_checkpoint(checkpoint, config)
    if component == "vae":
        return converters.convert_ldm_vae_checkpoint(checkpoint, config)
    if component == "text_encoder" and (xl or config["hidden_act"] == "quick_gelu"):
        encoder = converters.convert_ldm_clip_checkpoint(checkpoint)
    else:
        text_model = type("TextModel", (), {"config": type("Config", (), {"hidden_size": config["hidden_size"]})})
        # At true size diffusers skips the layer that SD 2 never runs, by its number.
        beyond = f"{OPEN_CLIP[component]}transformer.resblocks.{config['num_hidden_layers']}."
        kept = {key: value for key, value in checkpoint.items() if not key.startswith(beyond)}
        encoder = converters.convert_open_clip_checkpoint(text_model, kept, prefix=OPEN_CLIP[component])
    return {key.removeprefix("text_model."): value for key, value in encoder.items()}
