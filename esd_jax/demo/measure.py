"""How often the probe recognises what was asked for: on the erased style's own prompts, and on all others."""

from dataclasses import dataclass

from esd_jax import demo
from esd_jax.demo import probe
from esd_jax.pipeline import Pipeline, sample

NUM_STEPS, GUIDANCE = 20, 3.0  # what the embedded model was tuned for


@dataclass(frozen=True)
class Rates:
    """Shares of images, 0 to 1.

    own_style: images of the erased style's prompts in which the probe sees that style.
    own_object: the same images, in which it sees the object that was asked for.
    other_style, other_object: the same for the prompts of all other styles.
    num_own, num_other: how many images each share is taken over.
    """

    own_style: float
    own_object: float
    other_style: float
    other_object: float
    num_own: int
    num_other: int


def measure(pipeline: Pipeline, style: str, num_images: int = 400, seed: int = 1) -> Rates:
    """Draws `num_images` images, a third of them of `style`, with every object and style in turn.

    Image i of two pipelines starts from the same noise, so that their rates can be compared.
    """
    num_own = num_images // 3
    own = [(name, style) for name in demo.objects()]
    others = demo.pairs(without=[style])
    # Steps coprime to the number of pairs visit all of them, and mix objects and styles in any prefix.
    asked = [own[i % len(own)] for i in range(num_own)]
    asked += [others[97 * i % len(others)] for i in range(num_images - num_own)]
    images = sample(
        pipeline,
        [demo.prompt(*pair) for pair in asked],
        seed=seed,
        num_steps=NUM_STEPS,
        guidance_scale=GUIDANCE,
        batch_size=32,
    )
    seen = probe.classify(images)
    right_object = seen.objects == [demo.objects().index(name) for name, _ in asked]
    right_style = seen.styles == [demo.styles().index(style) for _, style in asked]
    shares = (
        a.mean().item()
        for half in (slice(num_own), slice(num_own, None))
        for a in (right_style[half], right_object[half])
    )
    return Rates(*shares, num_own, num_images - num_own)
