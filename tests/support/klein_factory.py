"""A tiny checkpoint of FLUX.2 [klein] with random weights, made by torch diffusers: see `factories`."""

import diffusers
import torch
import transformers
from factories import randomize, save
from tokenizers import AddedToken

MERGES = ("c a", "ca t", "Ġ o", "Ġo f", "u s", "e r", "us er", "Ċ Ċ", "p h", "Ġ a")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
VOCAB_SIZE = 256 + len(MERGES) + len(SPECIAL)
PADDING = 256 + len(MERGES)
WIDTH = 24  # of the text encoder
LAYERS = (1, 2, 3)  # whose hidden states are taken, of five
CHANNELS = 4  # of the VAE's latents, of which 2 x 2 are one
# What Qwen3's template makes of one user's turn.
TEMPLATE = (
    "{%- for message in messages %}"
    r"{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    r"{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def make_klein(folder, *, seed=0, dtype=torch.float32, **transformer) -> diffusers.Flux2KleinPipeline:
    """FLUX.2 [klein] before its distillation."""
    torch.manual_seed(seed)
    config = {
        "in_channels": 4 * CHANNELS, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 20,
        "num_attention_heads": 2, "joint_attention_dim": len(LAYERS) * WIDTH, "mlp_ratio": 1.5,
        "axes_dims_rope": (2, 4, 6, 8), "rope_theta": 50, "guidance_embeds": False,
    }  # fmt: skip
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_klein_vae(),
        text_encoder=make_qwen3(),
        tokenizer=make_qwen3_tokenizer(),
        transformer=randomize(diffusers.Flux2Transformer2DModel(**{**config, **transformer})),
        is_distilled=False,
    )
    return save(pipe, folder, dtype, "json")


def make_klein_vae() -> diffusers.AutoencoderKLFlux2:
    """Factor 2, with statistics far from those of no normalisation."""
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, latent_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 4.0)
    return randomize(vae)


def make_qwen3(**config) -> transformers.Qwen3ForCausalLM:
    """Five layers, of which two are not needed; four heads of queries and two of keys, of a size of their own."""
    tiny = {
        "vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "pad_token_id": PADDING,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}, "tie_word_embeddings": True,
        "max_position_embeddings": 512, "out_layers": LAYERS,
    }  # fmt: skip
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**tiny, **config}))
    with torch.no_grad():
        randomize(model).model.embed_tokens.weight.normal_(std=1.0)
    return model


def make_qwen3_tokenizer() -> transformers.Qwen2Tokenizer:
    """Byte-level BPE with ten merges, and the chat's tokens."""
    pairs = [tuple(pair.split()) for pair in MERGES]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*alphabet, *("".join(pair) for pair in pairs), *SPECIAL]
    tokenizer = transformers.Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=pairs)
    tokenizer.add_tokens([AddedToken(token, special=token in SPECIAL[:3]) for token in SPECIAL])
    tokenizer.chat_template = TEMPLATE
    return tokenizer
