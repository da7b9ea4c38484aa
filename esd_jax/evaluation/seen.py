"""Detection of a concept in images, for attacks, early stopping and the search for settings."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

from esd_jax.erasure import ConceptText, as_texts
from esd_jax.evaluation import prompts
from esd_jax.evaluation.drawing import MOST_STEPS, of_family
from esd_jax.evaluation.gather import Metric
from esd_jax.evaluation.judges import detectors
from esd_jax.metrics.intervals import Estimate, clustered_rate, known, mean
from esd_jax.metrics.likeness import ssim
from esd_jax.pictures import check_not_blank
from esd_jax.pipeline import Pipeline
from esd_jax.sampling import sample

Images = UInt8[np.ndarray, "n height width 3"]
Detect = Callable[[Images], Bool[np.ndarray, " n"]]


@dataclass(frozen=True)
class Question:
    """A concept to detect in images of some prompts.

    prompts: those that ask for the concept; image i is of prompt i, cyclically, from a seed of its own.
    detect: which images show it. judge: the detector's name.
    num_steps, guidance_scale: None: those of the model's family, at most 20 steps.
    """

    prompts: tuple[str, ...]
    detect: Detect
    judge: str
    num_images: int = 40
    seed: int = 1
    num_steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 32

    def draw(self, pipeline: Pipeline) -> Images:
        """A model's images of the prompts."""
        prompts = [self.prompts[i % len(self.prompts)] for i in range(self.num_images)]
        own = of_family(self, pipeline, MOST_STEPS)
        return sample(
            pipeline,
            prompts,
            seed=[self.seed * 1_000_003 + i & 0xFFFFFFFF for i in range(self.num_images)],
            steps=own.num_steps,
            sampler="auto",
            guidance_scale=own.guidance_scale,
            batch_size=self.batch_size,
        )

    def rate(self, pipeline: Pipeline) -> Estimate:
        """The concept's detection rate in a model's images. Raises ValueError where all are blank."""
        images = self.draw(pipeline)
        check_not_blank(images, "the model")
        return known(clustered_rate(self.detect(images), np.arange(self.num_images) % len(self.prompts)))


def below(question: Question, rate: float) -> Callable[[Pipeline], bool]:
    """For `erase(stop_when=)`: whether the concept's detection rate is at most `rate`."""
    if not 0 <= rate < 1:
        raise ValueError(f"a rate to stop at must be in 0..1, not {rate}")
    return lambda pipeline: question.rate(pipeline).value <= rate


def detector(name: str, concept: ConceptText, base: Pipeline | None = None) -> tuple[Detect, str]:
    """A detector of a concept, by name.

    Args:
      name: "nudenet" or "nudenet:CONVENTION"; "imagenet:CLASS"; or that of a testbed: "probe", which knows what the
        embedded model knows.
      concept: the text of what was erased, or the texts; for a testbed's.
      base: whose images it is to see.

    Returns (images -> which of them show it, the detector's name).

    Raises ValueError for an unknown one, one whose library or weights are not there, and one of a testbed that cannot
    see the base's images.
    """
    kind, _, which = name.partition(":")
    from esd_jax.evaluation import testbed  # which asks questions itself

    testbeds = {bed.detector_name: bed for bed in reversed(testbed.known())}  # of those that share one, the first
    if name in testbeds:
        detect, known = testbeds[name].detector(as_texts(concept))
        if base is not None and (size := base.family.default_size(base.configs)):
            try:
                detect(np.zeros((1, *size, 3), np.uint8))  # before any are drawn
            except ValueError as error:
                raise ValueError(f"{error}: choose another detector, {detectors.NAMES}") from error
        return detect, known
    if kind == "nudenet":
        convention = detectors.convention(which or "esd")
        named = detectors.nudity_identity(convention)
        return (lambda images: detectors.flagged(detectors.nudity(images), convention)), named.name
    if kind == "imagenet" and which:
        wanted, named = detectors.imagenette(which), detectors.imagenet_identity(detectors.CLASSIFIER)
        return (
            lambda images: detectors.imagenet(images, detectors.CLASSIFIER, top=1).classes[:, 0] == wanted
        ), named.name
    raise ValueError(f"unknown detector {name!r}: choose {', '.join([*testbeds, detectors.NAMES])}")


def metric(base: Pipeline, question: Question, kept: str = "everyday") -> Metric:
    """A model -> (the concept's detection rate, the mean SSIM to the base's images of other prompts)."""
    cases = prompts.load(kept).cases[: question.num_images]
    texts = tuple(case.prompt for case in cases)
    other = dataclasses.replace(question, prompts=texts, num_images=len(texts))
    first = other.draw(base)
    window = min(25, *first.shape[1:3])
    return lambda model: (question.rate(model), mean(ssim(other.draw(model), first, window)))


judge = metric  # a former name
