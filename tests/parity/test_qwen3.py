"""Qwen3 as a text encoder, and its tokenizer, against transformers', on random weights."""

import json
import shutil
from functools import cache

import jax
import jax.numpy as jnp
import klein_factory
import numpy as np
import pytest
import torch
import torch_oracle
import transformers
from klein_factory import LAYERS, PADDING, VOCAB_SIZE
from messages import one_line
from saved_pipelines import edit_json
from torch_oracle import error, exactly, to_params

from esd_jax import text
from esd_jax.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from esd_jax.params import functional, num_scalars

TOLERANCE = {"float64": 1e-8, "float32": 1e-4}
# As text_encoder/config.json of FLUX.2-klein-base-4B says.
PUBLISHED = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36,
    "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PROMPTS = [
    "", "a cat", "  two\n\ncats ", "photo of 12 cats, it's", "猫 🐱 é", "e\u0301", "a <|im_end|> cat <think>",
    "\na cat", "<|endoftext|>",
]  # fmt: skip


@cache
def encoder(dtype):
    """(transformers' model, jitted apply, params)."""
    original = klein_factory.make_qwen3().to(getattr(torch, dtype))
    config = Qwen3Config.from_dict(original.config.to_dict())
    network = functional(lambda: Qwen3ForCausalLM(config, dtype=jnp.dtype(dtype)))
    weights = {name: value for name, value in original.state_dict().items() if not config.ignores(name)}
    return original, jax.jit(network.apply), to_params(weights, network)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_encoder(dtype, monkeypatch):
    """The padding of a row attends to its prompt, and nothing to the padding, which may occur within a prompt."""
    if dtype == "float64":
        torch_oracle.exact_flow(monkeypatch)
    torch.manual_seed(0)
    with exactly(dtype):
        original, apply, params = encoder(dtype)
        ids = np.random.default_rng(1).integers(0, PADDING, (3, 40))
        attended = np.ones_like(ids)
        ids[1, 20:], ids[2, 1:], ids[0, 3] = PADDING, PADDING, PADDING
        attended[1, 20:], attended[2, 1:] = 0, 0
        with torch.no_grad():
            states = original(
                torch.from_numpy(ids), attention_mask=torch.from_numpy(attended), output_hidden_states=True
            ).hidden_states
        theirs = torch.cat([states[i] for i in LAYERS], dim=-1)
        ours = apply(params, ids)
        assert ours.dtype == dtype and error(ours, theirs) <= TOLERANCE[dtype]
        rows = params["model.embed_tokens.weight"][ids]
        assert error(apply(params, ids, rows), ours) <= 1e-6


def test_names_and_shapes_of_the_published_one():
    config = Qwen3Config.from_dict(PUBLISHED)
    network = functional(lambda: Qwen3ForCausalLM(config))
    with torch.device("meta"):
        original = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**PUBLISHED))
    theirs = {name: tuple(value.shape) for name, value in original.state_dict().items()}
    layers = {int(name.split(".")[2]) for name in theirs if config.ignores(name) and ".layers." in name}
    assert layers == {*range(27, 36)}
    expected = {name: shape for name, shape in theirs.items() if not config.ignores(name)}
    ours = {name: s.shape[::-1] if network.layouts[name] == "linear" else s.shape for name, s in network.shapes.items()}
    assert ours == expected and config.out_layers == (9, 18, 27)
    sizes = {name: int(np.prod(shape)) for name, shape in theirs.items() if name != "lm_head.weight"}
    one = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    assert sum(sizes.values()) == 4_022_468_096
    assert num_scalars(network.shapes) == sum(sizes.values()) - 9 * one - 2560  # nine layers, and the last norm


def test_both_spellings_of_its_config():
    plain = {"num_hidden_layers": 36, "hidden_size": 64}
    spelled = [{"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}]
    assert len({Qwen3Config.from_dict(plain | more) for more in spelled}) == 1
    assert Qwen3Config.from_dict(plain | {"pad_token_id": None}).pad_token_id == 151_643
    scaling = [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}},
    ]
    assert {Qwen3Config.from_dict(plain | more) for more in scaling} == {Qwen3Config.from_dict(plain)}


@pytest.mark.parametrize(
    "config, named",
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling="),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, "num_attention_heads=5"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"num_hidden_layers": 26}, "num_hidden_layers=26 must be at least 27"),
        ({"num_hidden_layers": 4, "out_layers": [1, 2, 5]}, "num_hidden_layers=4 must be at least 5"),
        ({"out_layers": [2, 1, 3]}, "out_layers=(2, 1, 3)"),
        ({"out_layers": [0, 1]}, "out_layers=(0, 1)"),
        ({"out_layers": []}, "out_layers=()"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(config, named):
    with pytest.raises(ValueError, match=one_line("Qwen3", named)):
        Qwen3Config.from_dict(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer as transformers writes it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    klein_factory.make_qwen3_tokenizer().save_pretrained(folder)
    return folder


TINY = Qwen3Config(vocab_size=VOCAB_SIZE, pad_token_id=PADDING)


@pytest.mark.parametrize("length", [80, 16], ids=["padded", "cut"])
@pytest.mark.filterwarnings("ignore::esd_jax.text.PromptTruncated")
def test_tokens_are_those_of_the_chat(folder, length):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    chats = [
        theirs.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for prompt in PROMPTS
    ]
    padded = theirs(chats, padding="max_length", max_length=length, truncation=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(text.read(folder, TINY, length)(PROMPTS), padded)
    assert (padded[0] == PADDING).any() == (length == 80)


def test_a_long_prompt_is_named(folder):
    ours = text.read(folder, TINY, 8)
    read = 8 - len(ours.words(text.BEFORE))
    with pytest.warns(text.PromptTruncated, match=f"the text encoder reads {read} tokens"):
        ours(["a cat of a cat of a cat"])
    with pytest.raises(ValueError, match=one_line("too long", "of a cat")):
        ours(["a cat of a cat of a cat"], strict=True)


def test_a_concept_must_leave_room_for_the_end_of_the_chat(folder):
    """Of a concept that is as long, the end of the chat would be cut off; of a prompt it is, as diffusers cuts it."""
    concept = "a cat of a cat of a cat"
    ours = text.read(folder, TINY, 80)
    words = len(ours.words(concept))
    fits, short = (text.read(folder, TINY, ours.before + words + ours.behind - less) for less in (0, 1))
    np.testing.assert_array_equal(fits([concept], strict=True)[0, -ours.behind :], ours.words(text.BEHIND))
    with pytest.raises(ValueError, match=one_line("too long", f"reads {words - 1} tokens")):
        short([concept], strict=True)
    np.testing.assert_array_equal(short([concept])[0], fits([concept])[0, :-1])


@pytest.mark.parametrize("field", ["padding_side", "truncation_side"])
def test_tokenizers_of_the_other_side_are_refused(field, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit_json(copy / "tokenizer_config.json", **{field: "right"})
    np.testing.assert_array_equal(text.read(copy, TINY, 20)(["a cat"]), text.read(folder, TINY, 20)(["a cat"]))
    edit_json(copy / "tokenizer_config.json", **{field: "left"})
    with pytest.raises(ValueError, match=one_line(copy, f"{field}='left'")):
        text.read(copy, TINY, 20)


def test_damaged_tokenizers_are_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(ValueError, match=one_line(copy, f"token {PADDING}", "token 3", "pad_token_id")):
        text.read(copy, Qwen3Config(pad_token_id=3), 20)
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("enable_thinking", "thinking"))
    with pytest.raises(ValueError, match=one_line(copy, "chat template", "enable_thinking")):
        text.read(copy, TINY, 20)
    template.unlink()
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<think>"]
    tokenizer["model"]["vocab"].pop("<think>", None)
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=one_line(copy, "no token '<think>'")):
        text.read(copy, TINY, 20)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=one_line(copy, "tokenizer.json", "transformers")):
        text.read(copy, TINY, 20)
