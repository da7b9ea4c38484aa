"""T5's encoder and tokenizer against transformers', on random weights."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle
import transformers
from flow_factories import PIECES, make_t5_tokenizer
from messages import one_line
from paths import DATA
from torch_oracle import error, exactly, to_params

from esd_jax import text
from esd_jax.models.t5 import T5Config, T5EncoderModel, distance_buckets
from esd_jax.params import functional, num_scalars

TOLERANCE = {"float64": 1e-8, "float32": 1e-4}
# d_kv x num_heads is not d_model, and no two widths are equal.
TINY = {
    "vocab_size": 60, "d_model": 24, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
PROMPTS = ["", "a photo of a cat", "Van Gogh", "  two   spaces\nnew line ", "🐱 猫", "a </s> b", "photos, photography"]


@cache
def encoder(dtype):
    config = transformers.T5Config(**TINY)
    original = torch_oracle.random_(transformers.T5EncoderModel(config)).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, value in original.named_parameters():
            if "SelfAttention.q" in name:
                value.mul_(3.0)  # so that attention is far from uniform
    network = functional(lambda: T5EncoderModel(T5Config.from_dict(config.to_dict()), dtype=jnp.dtype(dtype)))
    weights = {name: value for name, value in original.state_dict().items() if "embed_tokens" not in name}
    return original, jax.jit(network.apply), to_params(weights, network)


@pytest.mark.parametrize("tokens", [40, 139])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_encoder(dtype, tokens, monkeypatch):
    """Beyond 128 tokens all distances share the last bucket. Padding takes part: no pipeline masks it."""
    if dtype == "float64":
        torch_oracle.exact_flow(monkeypatch)
    with exactly(dtype):
        original, apply, params = encoder(dtype)
        ids = np.random.default_rng(tokens).integers(2, TINY["vocab_size"], (2, tokens))
        ids[1, tokens // 2 :] = 0
        with torch.no_grad():
            theirs = original(torch.from_numpy(ids)).last_hidden_state
        ours = apply(params, ids)
        assert ours.dtype == dtype and error(ours, theirs) <= TOLERANCE[dtype]


def test_the_buckets_of_distances():
    buckets = distance_buckets(600, 32, 128)
    relative = torch.arange(600)[None] - torch.arange(600)[:, None]
    attention = transformers.models.t5.modeling_t5.T5Attention
    np.testing.assert_array_equal(buckets, attention._relative_position_bucket(relative))
    firsts = [int(np.argmax(buckets[:, 0] == bucket)) for bucket in range(8, 16)]
    assert firsts == [8, 12, 16, 23, 32, 46, 64, 91]


def test_the_encoder_of_xxl():
    network = functional(lambda: T5EncoderModel(T5Config.from_dict(XXL | {"feed_forward_proj": "gated-gelu"})))
    assert num_scalars(network.shapes) == 4_762_310_656 and len(network.shapes) == 219
    assert network.shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape == (32, 64)
    assert network.shapes["encoder.block.23.layer.1.DenseReluDense.wi_1.weight"].shape == (4096, 10240)


def test_both_spellings_of_its_config():
    plain = {"d_model": 24, "num_layers": 2}
    spelled = [
        {"feed_forward_proj": "gated-gelu"},
        {"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"},
        {"is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh"},
    ]
    assert len({T5Config.from_dict(plain | more) for more in spelled}) == 1


@pytest.mark.parametrize(
    "config, named",
    [
        ({}, "feed_forward_proj='relu'"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu'"),
        ({"is_gated_act": False, "dense_act_fn": "gelu_new"}, "is_gated_act=False"),
        ({"dense_act_fn": "relu"}, "dense_act_fn='relu'"),
        ({"feed_forward_proj": "gated-gelu", "model_type": "umt5"}, "model_type='umt5'"),
        ({"feed_forward_proj": "gated-gelu", "num_layers": 10**6}, "num_layers"),
        ({"feed_forward_proj": "gated-gelu", "d_kv": "64"}, "d_kv='64'"),
        ({"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 6}, "relative_attention_num_buckets=6"),
        (
            {"feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 8},
            "relative_attention_max_distance=8",
        ),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(config, named):
    with pytest.raises(ValueError, match=one_line("T5", named)):
        T5Config.from_dict(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer as transformers writes it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_t5_tokenizer().save_pretrained(folder)
    return folder


def test_tokens_are_those_of_transformers(folder):
    theirs = transformers.T5Tokenizer.from_pretrained(folder)
    ours = text.read(folder, T5Config(), 20)
    padded = theirs(PROMPTS, padding="max_length", max_length=20, truncation=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(ours(PROMPTS), padded)
    assert ours([""])[0].tolist() == [1] + [0] * 19
    assert ours.words("a photo") == [PIECES.index(("▁a", -2.5)), PIECES.index(("▁photo", -4.0))]
    assert ours.words("猫") == [PIECES.index(("▁", -2.0)), 2]


def test_a_long_prompt_is_cut_before_its_end_token(folder):
    theirs, ours = transformers.T5Tokenizer.from_pretrained(folder), text.read(folder, T5Config(), 6)
    prompt = "a photo of two cat"
    with pytest.warns(text.PromptTruncated, match="the text encoder reads 5 tokens"):
        cut = ours([prompt + " of a photo"])
    expected = theirs([prompt + " of a photo"], padding="max_length", max_length=6, truncation=True)["input_ids"]
    assert cut.tolist() == expected and cut[0, -1] == 1
    with pytest.raises(ValueError, match=one_line("too long", "'of a'")):
        ours([prompt + " of a"], strict=True)


def test_damaged_tokenizers_are_named(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"], tokenizer["added_tokens"] = tokenizer["model"]["vocab"][3:], []
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=one_line(tmp_path, "no token '</s>'")):
        text.read(tmp_path, T5Config(), 20)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=one_line(tmp_path, "copy or download tokenizer.json again")):
        text.read(tmp_path, T5Config(), 20)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=one_line(tmp_path, "spiece.model", "transformers")):
        text.read(tmp_path, T5Config(), 20)


def test_the_published_tokens(tmp_path):
    """Of T5 v1.1's pieces those that occur in these prompts, with their published numbers and log-probabilities."""
    pieces = json.loads((DATA / "t5_pieces.json").read_text())
    vocab = [(piece, score) for piece, (_, score) in pieces.items()]
    transformers.T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(tmp_path)
    tokenizer, numbers = text.read(tmp_path, T5Config(), 20), [number for number, _ in pieces.values()]
    published = {
        "": [1],
        "a photo of a cat": [3, 9, 1202, 13, 3, 9, 1712, 1],
        "Van Gogh": [4480, 1263, 122, 107, 1],
        "  two   spaces\nnew line ": [192, 4856, 126, 689, 1],
        "a </s> b": [3, 9, 1, 3, 115, 1],
        "painting in the style of Van Gogh, oil on canvas": [
            3924,
            16,
            8,
            869,
            13,
            4480,
            1263,
            122,
            107,
            6,
            1043,
            30,
            10788,
            1,
        ],
    }
    for prompt, expected in published.items():
        ids = tokenizer([prompt])[0]
        assert [numbers[i] for i in ids] == expected + [0] * (20 - len(expected)), prompt
