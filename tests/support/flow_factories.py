"""Tiny checkpoints of FLUX.1 and SD3 with random weights, made by torch diffusers: see `factories`.

No weight is left at an initial value, and no two widths that a mistake could take for each other are equal.
"""

import diffusers
import torch
import transformers
from factories import END, WIDTH, make_text_encoder, make_tokenizer, make_vae, randomize, save

# Log-probabilities under which some words are a piece and others letters.
PIECES = [
    ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -2.5), ("▁photo", -4.0), ("▁of", -3.0),
    ("▁cat", -4.5), ("graph", -6.0), ("▁two", -5.0), ("s", -3.0), ("▁V", -5.5), ("an", -4.0),
    *((letter, -7.0 - i / 10) for i, letter in enumerate("abcdefghijklmnopqrtuvwxyzGVN,.")),
]  # fmt: skip
T5_WIDTH = 72  # above that of two CLIPs side by side
CHANNELS = 4  # of the latents


def make_flux(folder, *, dev=True, seed=0, **transformer) -> diffusers.FluxPipeline:
    """[dev] takes the guidance as an input, and its shift depends on the image's size; [schnell] has neither."""
    torch.manual_seed(seed)
    config = {
        "in_channels": 4 * CHANNELS, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": T5_WIDTH, "pooled_projection_dim": WIDTH,
        "guidance_embeds": dev, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dev else 1.0, use_dynamic_shifting=dev, base_image_seq_len=4, max_image_seq_len=64
        ),
        vae=make_flow_vae(),
        text_encoder=make_text_encoder(hidden_act="quick_gelu", eos_token_id=2),  # 2: wrong, but as on the hub
        tokenizer=make_tokenizer(pad_token=END),
        text_encoder_2=make_t5(),
        tokenizer_2=make_t5_tokenizer(),
        transformer=randomize(diffusers.FluxTransformer2DModel(**{**config, **transformer})),
    )
    return save(pipe, folder, torch.float32, "files")


def make_sd3(folder, *, t5=True, seed=0, **transformer) -> diffusers.StableDiffusion3Pipeline:
    """As SD3.5 medium: normalised queries and keys, and a second attention in the first block."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": T5_WIDTH,
        "caption_projection_dim": 32, "pooled_projection_dim": WIDTH + 20, "pos_embed_max_size": 8,
        "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_flow_vae(),
        text_encoder=make_text_encoder(hidden_act="quick_gelu", projection_dim=WIDTH, eos_token_id=2),
        tokenizer=make_tokenizer(pad_token=END),
        text_encoder_2=make_text_encoder(hidden_act="gelu", projection_dim=20),
        tokenizer_2=make_tokenizer(pad_token="!"),
        text_encoder_3=make_t5() if t5 else None,
        tokenizer_3=make_t5_tokenizer() if t5 else None,
        transformer=randomize(diffusers.SD3Transformer2DModel(**{**config, **transformer})),
    )
    return save(pipe, folder, torch.float32, "files")


def make_flow_vae() -> diffusers.AutoencoderKL:
    """Factor 2, a shift, and no convolutions between the moments and the latents."""
    options = {"use_quant_conv": False, "use_post_quant_conv": False}
    return make_vae(latent_channels=CHANNELS, scaling_factor=0.7, shift_factor=0.25, **options)


def make_t5() -> transformers.T5EncoderModel:
    """Two layers."""
    config = transformers.T5Config(
        vocab_size=len(PIECES) + 3, d_model=T5_WIDTH, d_kv=10, d_ff=40, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    return randomize(transformers.T5EncoderModel(config))


def make_t5_tokenizer() -> transformers.T5Tokenizer:
    """T5's pieces of words, a few of them."""
    return transformers.T5Tokenizer(vocab=PIECES, extra_ids=0, model_max_length=12)
