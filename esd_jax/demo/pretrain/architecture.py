"""The embedded model's parts, as the config files of its diffusers folder, and its tokenizer."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from esd_jax.demo import captions
from esd_jax.demo.drawing import SIZE
from esd_jax.families import SD
from esd_jax.models.clip import CLIPTextConfig
from esd_jax.models.unet_config import UNetConfig
from esd_jax.models.vae import VAEConfig

TOKENS = 24  # the longest caption takes 12, and 2 for its ends
START, END = "<|startoftext|>", "<|endoftext|>"

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [24, 48, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "mid_block_add_attention": False,
    "norm_num_groups": 8,
    "sample_size": SIZE,
    "scaling_factor": 1.0,
}
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,  # the number of heads, as in every Stable Diffusion 1
    "block_out_channels": [48, 112, 160],
    "cross_attention_dim": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "sample_size": SIZE // 4,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    SD.denoiser: ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def text_encoder(vocab_size: int) -> dict[str, Any]:
    """The config of a CLIP text encoder for a tokenizer of so many tokens, the last of which ends a prompt."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu",
        "hidden_size": UNET["cross_attention_dim"],
        "intermediate_size": 512,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": TOKENS,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "vocab_size": vocab_size,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }


def configs(vocab_size: int) -> dict[str, UNetConfig | VAEConfig | CLIPTextConfig]:
    """Component -> its config."""
    return {
        SD.denoiser: UNetConfig.from_dict(UNET),
        "vae": VAEConfig.from_dict(VAE),
        "text_encoder": CLIPTextConfig.from_dict(text_encoder(vocab_size)),
    }


def write_tokenizer(folder: Path) -> int:
    """Writes a `CLIPTokenizer` for which every word of the captions is one token. The same one every time.

    Returns the number of tokens.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns at import that no torch is installed
    import transformers
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    texts = captions.every_caption()
    merges = _merges(Counter(word for text in texts for word, _ in split.pre_tokenize_str(text.lower())))
    # CLIP's vocabulary: every byte, every byte that ends a word, the merges, and two special tokens.
    words = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(merge) for merge in merges] + [START, END]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = transformers.CLIPTokenizer(
        vocab=vocab,
        merges=merges,  # pyright: ignore[reportArgumentType] (pairs, whatever it says)
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=TOKENS,
    )
    tokenizer.save_pretrained(folder)
    # The two files that older readers of a CLIP tokenizer want.
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return len(vocab)


def _merges(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding (Sennrich et al., 2016) that make each word one token, the commonest pair first.

    Pairs that are equally common come in the order of their spelling; the tokenizers library draws lots.
    """
    words, merges = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}, []
    while any(len(parts) > 1 for parts in words.values()):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = {word: _merged(parts, merges[-1]) for word, parts in words.items()}
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
