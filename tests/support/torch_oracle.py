"""What the tests share when a torch network is the oracle: random weights, and the same weights as our `Params`.

unet = torch_oracle.random_(diffusers.UNet2DConditionModel(**config), seed=0)
params = torch_oracle.to_params(unet.state_dict(), network)
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from esd_jax.params import Network, Params

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)  # waking its threads costs far more than these tiny networks do

# torch keeps [out, in] and [out, in, height, width]; JAX keeps [in, out] and [height, width, in, out].
AXES = {"linear": (1, 0), "conv": (2, 3, 1, 0), "embedding": (0, 1), "vector": (0,)}


def random_(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Randomises every parameter in place and returns the module, in eval mode and without gradients.

    Scales of norms ~ U(0.5, 1.5), biases ~ N(0, 0.1), embeddings ~ N(0, 1), other weights ~ N(0, 1 / inputs): a
    forgotten bias, a wrong norm or a missing scale shows.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, value in part.named_parameters(recurse=False):
                if type(part).__name__.endswith("Norm") and name == "weight":  # of layers, groups, and RMS norms
                    value.uniform_(0.5, 1.5, generator=generator)
                elif isinstance(part, torch.nn.Embedding):
                    value.normal_(0.0, 1.0, generator=generator)
                elif value.ndim == 1:
                    value.normal_(0.0, 0.1, generator=generator)
                else:
                    value.normal_(0.0, value[0].numel() ** -0.5, generator=generator)
    return module.eval().requires_grad_(False)


def to_params(state_dict: Mapping[str, torch.Tensor], network: Network) -> Params:
    """A torch state dict as `Params`: transposed by `network.layouts`, CLIP's `text_model.` prefix stripped.

    The dtype is kept (float64 needs JAX's x64 mode). Raises ValueError where names or shapes differ from the network's.
    """
    tensors = {name.removeprefix("text_model."): value for name, value in state_dict.items()}
    tensors = {name: value for name, value in tensors.items() if not name.endswith("position_ids")}
    if tensors.keys() != network.layouts.keys():
        raise ValueError(f"names differ: {sorted(tensors.keys() ^ network.layouts.keys())[:4]}")
    params = {}
    for name, value in tensors.items():
        array, layout = value.detach().numpy(), network.layouts[name]
        array = array if layout == "vector" else array.transpose(AXES[layout])  # which may have several axes
        if array.shape != network.shapes[name].shape:
            raise ValueError(f"{name}: the oracle has {array.shape}, the network {network.shapes[name].shape}")
        params[name] = jnp.array(array)  # a copy: the oracle may be freed, or trained on
    return params


def to_nhwc(images: torch.Tensor) -> np.ndarray:
    """torch [batch, channels, height, width] -> numpy [batch, height, width, channels]."""
    return np.ascontiguousarray(images.detach().permute(0, 2, 3, 1).numpy())


def to_nchw(images: np.ndarray) -> torch.Tensor:
    """numpy [batch, height, width, channels] -> torch [batch, channels, height, width]."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2)))


def in_pipeline(scheduler: diffusers.SchedulerMixin) -> diffusers.SchedulerMixin:
    """The scheduler as `StableDiffusionPipeline` uses it: the pipeline corrects its config when it is built."""
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what it corrects
        pipe = diffusers.StableDiffusionPipeline(**absent, scheduler=scheduler, requires_safety_checker=False)
    return pipe.scheduler


def error(ours: object, theirs: object) -> float:
    """max|a - b| / max|b|; a NaN anywhere makes it NaN, which no tolerance accepts."""
    a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64) for x in (ours, theirs))
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    return float(np.abs(a - b).max() / np.abs(b).max())


@contextmanager
def exactly(dtype: str) -> Iterator[None]:
    """JAX in "float64" or "float32", at full precision."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield


def exact_sinusoid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes diffusers embed timesteps in float64: it does so in float32 even in a float64 network."""

    def embedding(timesteps, channels, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1, max_period=10000):
        exponent = torch.arange(channels // 2, dtype=torch.float64) / (channels // 2 - downscale_freq_shift)
        angles = scale * timesteps[:, None].double() * torch.exp(-math.log(max_period) * exponent)
        parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
        return torch.cat(parts, dim=-1)

    monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", embedding)


def exact_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes diffusers' flow transformers, T5 and Qwen3 compute in float64 what they compute in float32 regardless: the
    time's sinusoid, rotations, and RMS norms.
    """

    def angles(dim, positions, theta=10000.0, **_):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        both = torch.outer(positions.double(), theta**-exponents).repeat_interleave(2, dim=1)
        return both.cos(), both.sin()

    def rotate(x, rotation, **_):
        cos, sin = (part[None, :, None] for part in rotation)
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(3)
        return x * cos + turned * sin

    def norm(self, h):
        epsilon = getattr(self, "eps", None) or self.variance_epsilon
        return self.weight * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)

    def of_halves(self, x, positions):
        size, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
        both = (positions[..., None].double() * theta**-exponents).repeat(1, 1, 2)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)

    exact_sinusoid(monkeypatch)
    for network in ("transformer_flux", "transformer_flux2"):
        monkeypatch.setattr(f"diffusers.models.transformers.{network}.get_1d_rotary_pos_embed", angles)
        monkeypatch.setattr(f"diffusers.models.transformers.{network}.apply_rotary_emb", rotate)
    monkeypatch.setattr("diffusers.models.normalization.RMSNorm.forward", norm)
    monkeypatch.setattr("transformers.models.t5.modeling_t5.T5LayerNorm.forward", norm)
    monkeypatch.setattr("transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm.forward", norm)
    monkeypatch.setattr("transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding.forward", of_halves)
