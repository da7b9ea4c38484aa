"""Tiny Stable Diffusion checkpoints with random weights, made by torch diffusers: the oracles of the tests.

`make_sd1`, `make_sd2` and `make_sdxl` write a diffusers folder and return the torch pipeline that wrote it. The three
differ as their big originals do (heads, projections, prediction type, padding token, number of text encoders). Nothing
is left at an initial value that could hide a mistake: norm scales are U(.5, 1.5), no bias is zero.
"""

import json
from pathlib import Path

import diffusers
import safetensors.torch
import torch
import transformers

torch.set_num_threads(1)  # waking its threads costs far more than these tiny networks do
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = (
    *("t h", "th e</w>", "o f</w>", "i n</w>", "a t</w>", "c at</w>", "d o", "do g</w>", "o n", "e r</w>"),
    *("p h", "ph o", "pho t", "phot o</w>", "s t", "st y", "sty l", "styl e</w>", "a n", "an d</w>"),
)
VOCAB_SIZE = 2 * 256 + len(MERGES) + 2
WIDTH = 32  # of each text encoder


def make_sd1(folder, *, dtype=torch.float32, tokenizer="files", seed=0, **unet) -> diffusers.DiffusionPipeline:
    """SD 1: `attention_head_dim` is the number of heads, 1x1 convolutions, predicts eps, pads with the end token.

    Args:
      folder: where the checkpoint is written.
      dtype: of every tensor in the files, and of the pipeline that is returned.
      tokenizer: "files" (vocab.json and merges.txt, as on the hub) or "json" (tokenizer.json alone, as transformers 5
        writes).
      seed: of the weights.
      **unet: fields of the UNet's config that differ from the tiny default.
    """
    torch.manual_seed(seed)
    text_encoder = make_text_encoder(hidden_act="quick_gelu", eos_token_id=2)  # 2: wrong, but as on the hub
    scheduler = diffusers.PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    pipe = diffusers.StableDiffusionPipeline(
        vae=make_vae(scaling_factor=0.18215),
        text_encoder=text_encoder,
        tokenizer=make_tokenizer(pad_token=END),
        unet=make_unet(**{"attention_head_dim": 2, "cross_attention_dim": WIDTH, **unet}),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return save(pipe, folder, dtype, tokenizer)


def make_sd2(folder, *, dtype=torch.float32, tokenizer="files", seed=0, **unet) -> diffusers.DiffusionPipeline:
    """SD 2 (768 px): heads per block, linear projections, predicts v, gelu in the text encoder, pads with "!"."""
    torch.manual_seed(seed)
    heads = {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}
    scheduler = diffusers.DDIMScheduler(
        **NOISE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=make_vae(scaling_factor=0.18215),
        text_encoder=make_text_encoder(hidden_act="gelu"),
        tokenizer=make_tokenizer(pad_token="!"),
        unet=make_unet(**{**heads, "cross_attention_dim": WIDTH, **unet}),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return save(pipe, folder, dtype, tokenizer)


def make_sdxl(folder, *, dtype=torch.float32, tokenizer="files", seed=0, **unet) -> diffusers.DiffusionPipeline:
    """SDXL: two text encoders, the second with a projection; attention in the lower block alone, two layers deep."""
    torch.manual_seed(seed)
    config = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 2 * WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
    scheduler = diffusers.EulerDiscreteScheduler(**NOISE, steps_offset=1, timestep_spacing="leading")
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=make_vae(scaling_factor=0.13025),
        text_encoder=make_text_encoder(hidden_act="quick_gelu"),
        text_encoder_2=make_text_encoder(hidden_act="gelu", projection_dim=WIDTH),
        tokenizer=make_tokenizer(pad_token=END),
        tokenizer_2=make_tokenizer(pad_token="!"),
        unet=make_unet(**{**config, **unet}),
        scheduler=scheduler,
        add_watermarker=False,
    )
    return save(pipe, folder, dtype, tokenizer)


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def make_unet(**config) -> diffusers.UNet2DConditionModel:
    """Two resolutions, 8 x 8 latents, attention in the upper one unless the config says otherwise."""
    tiny = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return randomize(diffusers.UNet2DConditionModel(**{**tiny, **config}))


def make_vae(**config) -> diffusers.AutoencoderKL:
    """Factor 2: images of 16 x 16 pixels, latents of 8 x 8."""
    tiny = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return randomize(diffusers.AutoencoderKL(**{**tiny, **config}))


def make_text_encoder(*, projection_dim=None, **config) -> transformers.PreTrainedModel:
    """Two layers; with `projection_dim` a `CLIPTextModelWithProjection`, else a `CLIPTextModel`."""
    tiny = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": projection_dim or WIDTH,
        "bos_token_id": VOCAB_SIZE - 2,
        "eos_token_id": VOCAB_SIZE - 1,
        "pad_token_id": VOCAB_SIZE - 1,
    }
    kind = transformers.CLIPTextModelWithProjection if projection_dim else transformers.CLIPTextModel
    return randomize(kind(transformers.CLIPTextConfig(**{**tiny, **config})))


def make_tokenizer(*, pad_token=END) -> transformers.CLIPTokenizer:
    """CLIP's byte-level BPE with 20 merges in place of 48,894: most letters are a token each."""
    vocab = {token: i for i, token in enumerate(_vocabulary())}
    merges = [tuple(pair.split()) for pair in MERGES]
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def write_tokenizer_files(tokenizer: transformers.CLIPTokenizer, folder: Path) -> None:
    """Writes a tokenizer as hub models have it, in place of the `tokenizer.json` of transformers 5."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": tokenizer.pad_token}
    settings = {**special, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(_vocabulary())}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))


@torch.no_grad()
def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Draws every parameter: norm scales U(.5, 1.5), biases N(0, .1), matrices N(0, 1/inputs), embeddings N(0, .3)."""
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            if name == "bias":
                value.normal_(std=0.1)
            elif value.ndim == 1:
                value.uniform_(0.5, 1.5)
            elif isinstance(part, torch.nn.Embedding):
                value.normal_(std=0.3)
            else:
                value.normal_(std=value[0].numel() ** -0.5)
    return module.eval()


def save(pipe: diffusers.DiffusionPipeline, folder, dtype: torch.dtype, tokenizer: str) -> diffusers.DiffusionPipeline:
    """Casts a pipeline, writes it as hub models are, with tokenizers in the form wanted, and returns it."""
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype=dtype).save_pretrained(folder)
    for name in ("text_encoder", "text_encoder_2"):
        if hasattr(pipe, name):
            name_text_model(Path(folder) / name / "model.safetensors")
    if tokenizer == "files":
        for name in ("tokenizer", "tokenizer_2"):
            if isinstance(getattr(pipe, name, None), transformers.CLIPTokenizer):
                write_tokenizer_files(getattr(pipe, name), Path(folder) / name)
    return pipe


def name_text_model(file: Path) -> None:
    """Gives a text encoder's tensors the names of hub models, "text_model...", which transformers 5 writes no more."""
    tensors = safetensors.torch.load_file(file)
    bare = ("embeddings.", "encoder.layers.", "final_layer_norm.")  # CLIP's: T5 has blocks
    named = {f"text_model.{key}" if key.startswith(bare) else key: value for key, value in tensors.items()}
    safetensors.torch.save_file(named, file, {"format": "pt"})


def _vocabulary() -> list[str]:
    """The 256 byte characters ("!" first, as in CLIP) alone and at a word's end, the merges, start and end."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*alphabet, *(char + "</w>" for char in alphabet), *("".join(pair.split()) for pair in MERGES)]
    return [*words, START, END]
