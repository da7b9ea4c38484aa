"""Stands in for the networks where only what is done with images is tested: a painter, and a probe that reads it."""

import re
from typing import NamedTuple

import numpy as np

from esd_jax.demo import gallery, vocabulary
from esd_jax.demo.groups import Target


class Verdict(NamedTuple):
    objects: np.ndarray
    categories: np.ndarray
    styles: np.ndarray
    recognised: np.ndarray


def reading(images, batch_size=64):
    """A probe for what `Painter` draws: the classes are the first pixel's."""
    objects, styles, recognised = images[:, 0, 0].astype(int).T
    categories = [vocabulary.categories().index(vocabulary.category(vocabulary.objects()[i])) for i in objects]
    return Verdict(objects, np.array(categories), styles, recognised > 0)


class Painter:
    """Draws what a prompt asks for, by name of the model; `erased` knows no neon, and no cat."""

    def __init__(self):
        self.calls, self.options = [], []

    def sample(self, pipeline, prompts, *, seed, steps, guidance_scale, batch_size, **options):
        assert (steps, guidance_scale) == (gallery.NUM_STEPS, gallery.GUIDANCE)
        self.calls.append((pipeline, list(zip(prompts, seed, strict=True))))
        self.options.append(options)
        # The same noise gives the same picture but for its first pixel.
        images = np.stack([np.random.default_rng(s).integers(0, 256, (32, 32, 3), np.uint8) for s in seed])
        for image, prompt in zip(images, prompts, strict=True):
            image[0, 0] = self.pixel(pipeline, prompt)
        return images

    @staticmethod
    def pixel(pipeline, prompt):
        def named(words):
            return next((word for word in words if re.search(rf"\b{word}\b", prompt)), None)

        style = vocabulary.styles().index(named(vocabulary.styles()) or "cartoon")
        category = named(vocabulary.categories()) or "pet"
        name = named(vocabulary.objects()) or vocabulary.members(category)[0]  # an implicit prompt draws the first
        if pipeline == "erased":
            if vocabulary.styles()[style] == "neon":
                style = vocabulary.styles().index("cartoon")
            if name == "cat":
                return vocabulary.objects().index("dog"), style, 0
        return vocabulary.objects().index(name), style, 1


def hired(monkeypatch):
    """A painter in place of the sampler and the probe."""
    painter = Painter()
    monkeypatch.setattr(gallery, "sample", painter.sample)
    monkeypatch.setattr(gallery.probe, "classify", reading)
    return painter


NEON, CAT = Target("style", ("neon",)), Target("object", ("cat",))
