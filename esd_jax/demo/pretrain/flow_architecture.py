"""The parts that the embedded rectified flow has beside those of the embedded Stable Diffusion, and its T5 tokenizer.

The VAE, CLIP and its tokenizer are the same files.
"""

import json
from pathlib import Path
from typing import Any

from esd_jax.demo import captions
from esd_jax.demo.pretrain import architecture
from esd_jax.demo.pretrain.architecture import TOKENS
from esd_jax.diffusion.flow import CLASS
from esd_jax.families import FLUX_UNDISTILLED
from esd_jax.models.flux import UNDISTILLED, FluxConfig
from esd_jax.models.t5 import T5Config

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # the first three ids, as in every T5
BOUNDARY = "\N{LOWER ONE EIGHTH BLOCK}"  # in a piece, where a word starts
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()-"
WIDTH = architecture.UNET["cross_attention_dim"]

# What the folder has of the embedded Stable Diffusion's, as it is.
SHARED = (
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    *(f"tokenizer/{name}" for name in ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")),
)
# FluxPipeline adds the shift, and cannot add None.
VAE: dict[str, Any] = {**architecture.VAE, "shift_factor": 0.0}
TRANSFORMER: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    UNDISTILLED: True,
    "patch_size": 1,
    "in_channels": 16,
    "out_channels": None,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 5,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": [8, 12, 12],
}
SCHEDULER: dict[str, Any] = {
    "_class_name": CLASS,
    "num_train_timesteps": 1000,
    "shift": 1.5,
    "use_dynamic_shifting": False,
}
MODEL_INDEX: dict[str, Any] = {
    "_class_name": FLUX_UNDISTILLED.pipeline,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", CLASS],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    FLUX_UNDISTILLED.denoiser: ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def text_encoder_2(vocab_size: int) -> dict[str, Any]:
    """The config of a T5 encoder for a tokenizer of so many tokens."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": WIDTH,
        "d_kv": 32,
        "d_ff": 256,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "is_gated_act": True,
        "dense_act_fn": "gelu_new",
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "n_positions": TOKENS,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "vocab_size": vocab_size,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }


def configs(vocab_size: int) -> dict[str, FluxConfig | T5Config]:
    """Component -> its config."""
    return {
        FLUX_UNDISTILLED.denoiser: FluxConfig.from_dict(TRANSFORMER),
        "text_encoder_2": T5Config.from_dict(text_encoder_2(vocab_size)),
    }


def write_tokenizer(folder: Path) -> int:
    """Writes a T5 tokenizer for which every word of the captions is one token. The same one every time.

    Other words fall to single characters, and capitals to the unknown token. Returns the number of tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    words = sorted({word for text in captions.every_caption() for word in text.lower().replace(",", " ").split()})
    # A Unigram model takes the split of the highest sum: a whole word before its letters. A comma is one of these.
    pieces = [(BOUNDARY + word, -1.0) for word in words]
    known = {piece for piece, _ in pieces}
    pieces += [(piece, -10.0) for piece in (BOUNDARY, *CHARACTERS) if piece not in known]
    vocabulary = [(PAD, 0.0), (END, 0.0), (UNKNOWN, -100.0), *pieces]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    # As transformers splits, whatever the file says; like T5 it distinguishes capitals, which no caption has.
    metaspace = pre_tokenizers.Metaspace(replacement=BOUNDARY, prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement=BOUNDARY, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "T5TokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "extra_ids": 0,
        "model_max_length": TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer.get_vocab_size()
