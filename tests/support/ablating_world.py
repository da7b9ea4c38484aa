"""What stands in for a checkpoint in the tests of Ablating Concepts and Forget-Me-Not, and a whole run of either."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from esd_world import SHAPE, toy_network, world
from esd_world import tools as world_tools
from esd_world import toy as toy_apply

import esd_jax
from esd_jax import api
from esd_jax.erasing.concepts import Concept
from esd_jax.methods.ablating import Ablating
from esd_jax.models.unet import Conditioning
from esd_jax.params import Network
from esd_jax.selection import select

CAT, ROBOT = Concept("grumpy cat", replace_with=("cat",)), Concept("R2D2", replace_with=("robot",))
PROMPTS = "a cat; a robot on a chair; the cat and the robot"
CELL = 2  # pixels a latent
OBJECT = {"kind": "object", "prior_weight": 0.2, "drawn_images": 3, "views": 2, "anchor_prompts": PROMPTS}


class Studio:
    """What draws and encodes images in place of a checkpoint, and remembers what it was asked."""

    def __init__(self, dtype: str = "float32"):
        self.dtype, self.asked = dtype, []

    def sample(self, prompts, **options):
        self.asked.append((prompts, options))
        rng = np.random.default_rng(len(self.asked))
        return rng.integers(0, 256, (len(prompts), CELL * SHAPE[0], CELL * SHAPE[1], 3), np.uint8)

    def to_latents(self, images):
        assert images.dtype == np.uint8 and len(images) <= 8
        cells = images.reshape(len(images), SHAPE[0], CELL, SHAPE[1], CELL, 3).astype(self.dtype).mean((2, 4)) / 64 - 2
        return jnp.asarray(np.concatenate([cells, cells[..., :1] * cells[..., 1:2]], axis=-1))


def make(w: Any, concepts: Any = (CAT, ROBOT), studio: Studio | None = None, **fields: Any) -> Any:
    studio = studio or Studio()
    tools = world_tools(w, sample=studio.sample, to_latents=studio.to_latents, images=fields.pop("images", None))
    return Ablating(**fields).make(tools, concepts)


def recorded(w: Any) -> tuple[Any, list[str]]:
    """The world, and the texts that it encodes from here on, in the order of their rows."""
    texts: list[str] = []

    def encode(batch):
        texts.extend(batch)
        return w.encode(batch)

    return w._replace(encode=encode), texts


def rows_of(texts: list[str], concepts: Any) -> list[str]:
    return texts[len(concepts) :]  # the concepts alone are encoded first, to see that they fit


def small(dtype: str = "float32") -> Any:
    """The toy, with a timestep for each example."""

    def apply(params, x, t, conditioning, *attention):
        one = lambda x, t, e: toy_apply(params, x[None], t, Conditioning(e[None]))[0]  # noqa: E731
        return jax.vmap(one)(x, t, conditioning.embeddings)

    w, net = world("toy", dtype), toy_network()
    return w._replace(network=Network(apply, net.shapes, net.layouts))


def run_end_to_end(base: Any, folder: Any, text: str, fields: dict[str, Any]) -> Any:
    """Two updates, and a third after resuming: log, previews, checkpoints, exports. Returns what was erased."""
    fields = {"steps": 3, "checkpoint_every": 1, "preview_every": 2, "preview_steps": 2, **fields}
    esd_jax.erase(base, text, output_dir=folder, **{**fields, "steps": 2})
    resumed = esd_jax.erase(base, text, output_dir=folder, resume=True, **fields)
    names = {f"unet/{name}" for name in select(fields["subset"], base.network("unet").layouts)}
    assert resumed.edits.keys() == names
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert [file.name for file in sorted((folder / "previews").iterdir())] == [f"step_{i:06d}.png" for i in (0, 2, 3)]
    assert len(list(folder.glob("esd-*.safetensors"))) == 1
    restored, exported = api.restore(folder), esd_jax.load(folder / "model")
    for name, value in resumed.edits.items():
        tensor = name.removeprefix("unet/")
        np.testing.assert_array_equal(restored.edits[name], value)
        np.testing.assert_array_equal(exported.params["unet"][tensor], value)
        assert 0 < np.abs(value - base.params["unet"][tensor]).max() < 0.1
    return resumed
