"""A student and a teacher, in torch and as our `Params`, on which the tests of ESD and of its step stand.

Their weights are unrelated, so that neither can be mistaken for the other. "unet" is a tiny Stable Diffusion 1 UNet;
"toy" is a network of three layers with the UNet's interface, for what does not hang on the architecture: it compiles
fast.
"""

import dataclasses
import zlib
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import esd_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle
from torch_oracle import AXES, exactly, to_nchw, to_params

from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Tools
from esd_jax.families import unets
from esd_jax.methods import esd
from esd_jax.models.unet import Conditioning, UNet2DConditionModel
from esd_jax.models.unet_config import UNetConfig
from esd_jax.params import Network, Params, functional, prefixed

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)  # threads cost these tiny networks thirty times what they save

SCHEDULE = Schedule.from_config({"_class_name": "PNDMScheduler", **esd_oracle.SD14, "skip_prk_steps": True})
SHAPE = (8, 8, 4)
TOKENS, CONTEXT = 7, 16
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": CONTEXT,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
EVERYWHERE = (("a cat", None), ("Van Gogh", None))
ATTRIBUTE = (("glasses", "a person with glasses"), ("Van Gogh", None))  # the two kinds, side by side in one batch


class ToyTorch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text, self.out = (torch.nn.Linear(n, m) for n, m in ((4, 8), (CONTEXT, 8), (8, 4)))

    def forward(self, x, t, encoder_hidden_states):
        text = self.text(encoder_hidden_states).tanh().mean(1)[:, None, None]
        time = (t * torch.arange(8) / 500).to(x.dtype).cos()
        hidden = (self.image(x.permute(0, 2, 3, 1)) + text + time).tanh()
        return SimpleNamespace(sample=self.out(hidden).permute(0, 3, 1, 2))


def toy(params: Params, x: jax.Array, t: jax.Array, conditioning: Conditioning) -> jax.Array:
    linear = lambda name, h: h @ params[f"{name}.weight"] + params[f"{name}.bias"]  # noqa: E731
    text = jnp.tanh(linear("text", conditioning.embeddings)).mean(1)[:, None, None]
    t = t if jnp.ndim(t) == 0 else t[:, None, None, None]  # one for all, or one for each
    time = jnp.cos(t * jnp.arange(8) / 500).astype(x.dtype)
    return linear("out", jnp.tanh(linear("image", x) + text + time))


def toy_network() -> Network:
    sizes = {"image": (4, 8), "text": (CONTEXT, 8), "out": (8, 4)}
    shapes = {f"{name}.weight": size for name, size in sizes.items()}
    shapes |= {f"{name}.bias": size[1:] for name, size in sizes.items()}
    layouts = {name: "linear" if len(shape) == 2 else "vector" for name, shape in shapes.items()}
    return Network(toy, {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}, layouts)


class World(NamedTuple):
    """A student and a teacher, there and here."""

    models: esd_oracle.Models
    network: Network
    student: Params
    teacher: Params
    encode: Any


def embedding(text: str) -> np.ndarray:
    return np.random.default_rng([1, *text.encode()]).standard_normal((TOKENS, CONTEXT))


@cache
def world(kind: str, dtype: str) -> World:
    make = {"unet": lambda: diffusers.UNet2DConditionModel(**UNET), "toy": ToyTorch}[kind]
    student, teacher = (torch_oracle.random_(make(), seed).to(getattr(torch, dtype)) for seed in (1, 0))
    if kind == "unet":
        network = functional(lambda: UNet2DConditionModel(UNetConfig.from_dict(UNET), dtype=jnp.dtype(dtype)))
    else:
        network = toy_network()

    def array(texts):
        return np.stack([embedding(text) for text in texts]).astype(dtype)

    with exactly(dtype):
        params = [prefixed(to_params(unet.state_dict(), network), "unet") for unet in (student, teacher)]
    models = esd_oracle.Models(student, teacher, lambda texts: torch.from_numpy(array(texts)))
    return World(models, network, *params, lambda texts: Conditioning(jnp.asarray(array(texts))))


def settings(preset: str, **fields: Any) -> esd.ESD:
    """A published variant with some settings changed."""
    known = {f.name for f in dataclasses.fields(esd.ESD)}
    chosen = esd.ESD.PRESETS[preset] | fields
    return esd.ESD(**{name: value for name, value in chosen.items() if name in known})


def tokens(texts: list[str]) -> np.ndarray:
    """Ids of words between 1 (start) and 2 (end), padded with the end, as Stable Diffusion 1 has them."""
    rows = [[1, *(10 + zlib.crc32(word.encode()) for word in text.lower().split()), 2] for text in texts]
    return np.array([row + [2] * (TOKENS - len(row)) for row in rows])


def tools(w: World, **others: Any) -> Tools:
    """What a method may use; by default no images."""
    absent = {"subset": (), "tokens": tokens, "sample": pytest.fail, "to_latents": pytest.fail}
    absent |= {"component": "unet", "null": unets.null, "vectors": lambda conditioning: conditioning.embeddings}
    return Tools(
        **{"denoiser": w.network, "schedule": SCHEDULE, "shape": SHAPE, "encode": w.encode, **absent, **others}
    )


def make(w: World, preset: str, pairs: Any, images: Any = None, **fields: Any) -> tuple[esd.Method, esd.Inputs]:
    concepts = [Concept(*pair) for pair in pairs]
    return settings(preset, **fields).make(tools(w, images=images), concepts)


def given(method: esd.Method, index: int, dtype: str, seed: int = 0) -> esd.Draws:
    """Draws by hand: example i erases concept i. The 2023 code draws t, too; here it depends on the index alone."""
    low, high = (int(table[index]) for table in (method.trajectory.t_low, method.trajectory.t_high))
    noise = np.random.default_rng([seed, index]).standard_normal((2, *SHAPE)).astype(dtype)
    t = low + 7 * (index + 1) % (high - low + 1)
    return esd.Draws(jnp.int32(index), jnp.float32(t), jnp.arange(2), jnp.asarray(noise), jnp.array([2, 0]))


def as_ours(w: World, name: str, value: torch.Tensor) -> np.ndarray:
    """A torch tensor of the UNet in our layout."""
    return value.detach().numpy().transpose(AXES[w.network.layouts[name]])


def reference(preset: str, models: esd_oracle.Models, pairs: Any, draws: esd.Draws, **options: Any):
    drawn = [int(draws.index)] + [int(draws.t)] * (preset == "paper")
    return getattr(esd_oracle, preset)(models, pairs, to_nchw(draws.noise), *drawn, **options)
