"""A model family of its own, as somebody outside the package would write it: nothing here touches `esd_jax`'s files.

The denoiser is a small transformer over 2 x 2 patches of the latents and one token for the prompt; it predicts the
velocity of a rectified flow. The text encoder is a bag of tokens. VAE and tokenizer are a tiny Stable Diffusion's.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import factories
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from esd_jax import families
from esd_jax.diffusion.path import RECTIFIED_FLOW
from esd_jax.diffusion.schedule import Schedule
from esd_jax.families import Family
from esd_jax.models.vae import AutoencoderKL, VAEConfig
from esd_jax.params import functional, initial
from esd_jax.selection import Subset

INDEX = {
    "_class_name": "ToyFlowPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["toy", "BagOfTokens"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["toy", "ToyTransformer"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    sample_size: int = 8
    in_channels: int = 4
    width: int = 32

    @classmethod
    def from_dict(cls, config):
        return cls(**{f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config})


@dataclasses.dataclass(frozen=True)
class BagConfig:
    vocab_size: int = 64
    max_position_embeddings: int = 77
    width: int = 32

    from_dict = classmethod(TransformerConfig.from_dict.__func__)


class ToyTransformer(nnx.Module):
    def __init__(self, config, *, dtype=jnp.float32, remat=False, rngs=None):
        rngs, width = rngs or nnx.Rngs(0), config.width
        self.config, self.dtype = config, dtype

        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, dtype=dtype, rngs=rngs)

        self.patch, self.prompt = linear(4 * config.in_channels, width), linear(width, width)
        self.to_q, self.to_k, self.to_v, self.to_out = (linear(width, width) for _ in range(4))
        self.time, self.out = linear(width, width), linear(width, 4 * config.in_channels)

    def __call__(self, x, t, conditioning):
        n, height, width, channels = x.shape
        patches = x.reshape(n, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        patches = self.patch(patches.reshape(n, -1, 4 * channels).astype(self.dtype))
        angles = jnp.broadcast_to(t, n)[:, None] / 1000 * jnp.arange(1, self.config.width + 1)
        tokens = jnp.concatenate([patches, self.prompt(conditioning["bag"].astype(self.dtype))[:, None]], 1)
        tokens = jnp.tanh(tokens + self.time(jnp.cos(angles).astype(self.dtype))[:, None])
        weights = jax.nn.softmax(self.to_q(tokens) @ self.to_k(tokens).swapaxes(1, 2) * self.config.width**-0.5)
        tokens = self.out(tokens + self.to_out(weights @ self.to_v(tokens)))[:, :-1]
        tokens = tokens.reshape(n, height // 2, width // 2, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        return tokens.reshape(x.shape)


class BagOfTokens(nnx.Module):
    def __init__(self, config, *, dtype=jnp.float32, rngs=None):
        self.tokens = nnx.Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs or nnx.Rngs(1))

    def __call__(self, ids):
        words = ids != ids[:, -1:]  # all but the padding
        return 6 * jnp.sum(jnp.where(words[..., None], self.tokens(ids), 0), axis=1)


def schedule(config):
    """sigma of each training timestep, shifted as SD3's is."""
    sigma = np.arange(1, config["num_train_timesteps"] + 1) / config["num_train_timesteps"]
    shift = config.get("shift", 1.0)
    return Schedule(config, shift * sigma / (1 + (shift - 1) * sigma), "flow_prediction", RECTIFIED_FLOW)


def side(configs):
    return configs["transformer"].sample_size * configs["vae"].factor


TOY = Family(
    name="the toy flow model",
    pipeline=INDEX["_class_name"],
    denoiser="transformer",
    components={
        "transformer": {"ToyTransformer": TransformerConfig},
        "vae": {"AutoencoderKL": VAEConfig},
        "text_encoder": {"BagOfTokens": BagConfig},
    },
    modules={TransformerConfig: ToyTransformer, VAEConfig: AutoencoderKL, BagConfig: BagOfTokens},
    encode=lambda configs, outputs, size: {"bag": outputs[0]},
    vectors=lambda conditioning: conditioning["bag"][:, None],
    null=lambda conditioning, where=True: {
        "bag": jnp.where(jnp.reshape(where, (-1, 1)), 0, conditioning["bag"]),
    },
    encoded=lambda configs, batch, dtype=jnp.float32: {
        "bag": jax.ShapeDtypeStruct((batch, configs["text_encoder"].width), dtype)
    },
    latents=lambda configs, size: (
        size[0] // configs["vae"].factor, size[1] // configs["vae"].factor, configs["transformer"].in_channels
    ),
    default_size=lambda configs: (side(configs), side(configs)),
    schedule=schedule,
    subsets={"attention": Subset(lambda name, dense: name.startswith("to_"), "the attention", "the toy's author")},
)  # fmt: skip
families.register(TOY)


def make(folder: Path) -> Path:
    """Writes a checkpoint of random weights, as a diffusers folder."""
    factories.make_sd1(folder / "sd1")
    toy = folder / "toy"
    for name in ("vae", "tokenizer"):
        shutil.copytree(folder / "sd1" / name, toy / name)
    for name, config, module, stem in (
        ("transformer", TransformerConfig(), ToyTransformer, "diffusion_pytorch_model"),
        ("text_encoder", BagConfig(factories.VOCAB_SIZE), BagOfTokens, "model"),
    ):
        (toy / name).mkdir()
        (toy / name / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        layouts = functional(lambda module=module, config=config: module(config)).layouts
        weights = {
            key: np.ascontiguousarray(np.asarray(value).T if layouts[key] == "linear" else value)
            for key, value in initial(lambda module=module, config=config: module(config)).items()
        }
        safetensors.numpy.save_file(weights, toy / name / f"{stem}.safetensors")
    (toy / "scheduler").mkdir()
    (toy / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (toy / "model_index.json").write_text(json.dumps(INDEX))
    return toy
