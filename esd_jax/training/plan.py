"""What a run will train, hold in memory and compute, worked out from shapes alone: nothing is allocated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from esd_jax import lora
from esd_jax.models.unet import Conditioning
from esd_jax.models.unet_config import UNetConfig
from esd_jax.params import Network, num_bytes, num_scalars, prefixed
from esd_jax.pipeline import NetworkConfig, image_size, network
from esd_jax.selection import select

LARGE = 2_000_000_000  # scalars; SD 1 and 2 have 0.9e9, SDXL 2.6e9


@dataclass(frozen=True)
class Plan:
    """A run's size.

    names: the tensors that are trained. trained, total: scalars of those, and of the UNet.
    memory: what occupies memory -> bytes. The activations are what the unfused backward pass would store, so XLA needs
      less for them; what it needs besides, for one layer at a time, is not counted.
    forward_flops: of one UNet evaluation of one example.
    step_flops: of one update, on average over the drawn timesteps.
    """

    names: tuple[str, ...]
    trained: int
    total: int
    memory: Mapping[str, int]
    forward_flops: float
    step_flops: float

    def __str__(self) -> str:
        lines = [
            f"trained   {len(self.names)} tensors, {self.trained:,} scalars "
            f"({self.trained / self.total:.2%} of the UNet's {self.total:,})",
            *(f"          {name}" for name in _abridged(self.names)),
            f"memory    about {_bytes(sum(self.memory.values()))}",
            *(f"          {_bytes(size):>10}  {what}" for what, size in self.memory.items()),
            f"compute   {self.forward_flops / 1e12:.3g} TFLOP a UNet evaluation, "
            f"{self.step_flops / 1e12:.3g} TFLOP an update on average",
        ]
        return "\n".join(lines)


def recomputes(recipe: Any, unet: UNetConfig) -> bool:
    """Whether the backward pass recomputes activations: where the recipe says so, and for a UNet of SDXL's size."""
    # At 1024 px in bfloat16 the activations would take 26 GiB, and everything else 16; recomputing costs one forward
    # pass, of about 50 in a step of ESD.
    return recipe.remat or num_scalars(network(unet, "float32").shapes) >= LARGE


def changed_names(recipe: Any, net: Network) -> tuple[str, ...]:
    """The tensors that a recipe changes."""
    names = select(recipe.subset, net.layouts)
    return lora.adaptable(names, net.shapes) if recipe.rank else names


def theta_shapes(recipe: Any, net: Network) -> Mapping[str, jax.ShapeDtypeStruct]:
    """What a recipe trains, "unet/NAME": the tensors that it changes, or the factors of their change."""
    changed = prefixed({name: net.shapes[name] for name in changed_names(recipe, net)}, "unet")
    if not recipe.rank:
        return changed
    return jax.eval_shape(lambda: lora.initial(changed, recipe.rank, jax.random.key(0)))


def make_plan(configs: Mapping[str, NetworkConfig], schedule: Any, recipe: Any) -> Plan:
    """Plans a run.

    Args:
      configs: component -> architecture.
      schedule: the checkpoint's `Schedule`.
      recipe: the `Recipe`; its concept and base are not read.
    """
    unet: UNetConfig = configs["unet"]
    dtype = jnp.dtype(recipe.dtype)
    net = network(unet, dtype.name, recomputes(recipe, unet))
    names = changed_names(recipe, net)
    changed, trained = {name: net.shapes[name] for name in names}, theta_shapes(recipe, net)
    batch, accumulate = recipe.training.batch_size, recipe.training.accumulate

    params = {name: jax.ShapeDtypeStruct(s.shape, dtype) for name, s in net.shapes.items()}
    one, several = (_inputs(configs, recipe, n) for n in (1, batch))
    forward = jax.jit(net.apply).lower(params, *one).cost_analysis()["flops"]
    others = {name: config for name, config in configs.items() if name != "unet"}
    memory = {
        f"UNet, {dtype.name}": num_bytes(params),
        f"text encoders and VAE, {dtype.name}, until training starts": sum(
            num_bytes(network(config, dtype.name).shapes, dtype) for config in others.values()
        ),
    }
    if not recipe.settings.trained:
        memory["changed tensors, float32"] = num_bytes(changed, jnp.float32)
    else:
        optimizer = jax.eval_shape(recipe.optimizer.transformation().init, trained)
        memory |= {
            f"trained tensors: float32, gradient, {dtype.name} copy": 2 * num_bytes(trained, jnp.float32)
            + num_bytes(changed, dtype),
            f"{recipe.optimizer.optimizer}'s state, float32": _size(optimizer),
            f"activations of the student's backward pass, batch {batch}": _activations(net, params, names, several),
        }
        if recipe.settings.ema is not None:
            memory["average of the trained tensors, float32"] = num_bytes(trained, jnp.float32)
    evaluations = batch * accumulate * recipe.settings.evaluations(schedule, recipe.images is not None)
    return Plan(names, num_scalars(trained), num_scalars(params), memory, forward, forward * evaluations)


def _activations(net: Network, params: Mapping[str, Any], names: tuple[str, ...], inputs: tuple[Any, ...]) -> int:
    """Bytes that the backward pass over the named tensors needs stored."""

    def residuals(theta: Any, rest: Any, *inputs: Any) -> Any:
        return jax.vjp(lambda theta: net.apply({**rest, **theta}, *inputs), theta)[1]

    theta, rest = ({n: s for n, s in params.items() if (n in names) == own} for own in (True, False))
    saved = jax.tree.leaves(jax.eval_shape(residuals, theta, rest, *inputs))
    # The weights are among the saved values, but they exist anyway.
    known = {s.shape for s in params.values()}
    return _size([leaf for leaf in saved if leaf.shape not in known or leaf.ndim < 2])


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _inputs(configs: Mapping[str, NetworkConfig], recipe: Any, batch: int) -> tuple[Any, ...]:
    unet, factor = configs["unet"], configs["vae"].factor
    height, width = (side // factor for side in image_size(configs, recipe.height, recipe.width))
    shape = lambda *s: jax.ShapeDtypeStruct((batch, *s), jnp.float32)  # noqa: E731
    conditioning = Conditioning(shape(configs["text_encoder"].max_position_embeddings, max(unet.contexts)))
    if unet.addition_embed_type:
        conditioning = Conditioning(conditioning.embeddings, shape(configs["text_encoder_2"].projection_dim), shape(6))
    return shape(height, width, unet.in_channels), jax.ShapeDtypeStruct((), jnp.float32), conditioning


def _abridged(names: tuple[str, ...], shown: int = 4) -> list[str]:
    if len(names) <= shown + 1:
        return list(names)
    return [*names[:shown], f"... and {len(names) - shown} more"]


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
