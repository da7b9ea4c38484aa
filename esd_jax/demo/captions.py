"""The captions of the model's training, and the prompts it is asked with.

Of all captions 60% name object and style, 10% the object, 10% the style, 10% a category or a keyword with or without a
style, and 10% are empty. Erasing conditions on a concept alone, so the model has to know prompts like "neon style"; and
prompts like "something sweet" reach an object without its name.
"""

import numpy as np

from esd_jax.demo import vocabulary

SHARES = {"both": 0.6, "object": 0.1, "style": 0.1, "category": 0.1, "empty": 0.1}
# The first of each is what the prompts of all measurements use, so it comes as often as all others together.
BOTH = (
    "{object} in {style} style",
    "{object}, {style} style",
    "{style} style, {object}",
    "a drawing of {object} in {style} style",
)
OBJECT = ("{object}", "a picture of {object}")
STYLE = ("{style} style", "{style}", "{style} drawing", "a drawing in {style} style")
# Phrasings that training never shows.
PARAPHRASES = ("{style} {bare}", "{bare} drawn in the style of {style}", "{style} picture of {object}")


def with_article(name: str) -> str:
    """ "a cat", "an octopus"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def prompt(name: str | None = None, style: str | None = None) -> str:
    """ "a cat in neon style", "an octopus", "neon style"."""
    if name is None:
        return STYLE[0].format(style=style) if style else ""
    template = BOTH[0] if style else OBJECT[0]
    return template.format(object=with_article(name), style=style)


def paraphrases(name: str, style: str) -> list[str]:
    """The held-out phrasings of a pair: "neon cat", ..."""
    return [p.format(object=with_article(name), bare=name, style=style) for p in PARAPHRASES]


def implicit(category: str) -> tuple[str, str]:
    """The prompts that reach a category without naming any of its objects: "a pet", "a furry friend"."""
    return with_article(category), vocabulary.KEYWORDS[category]


def draw_caption(rng: np.random.Generator, name: str, style: str) -> str:
    """A random caption of a picture of `name` in `style`."""
    kind = rng.choice(list(SHARES), p=list(SHARES.values()))
    if kind == "empty":
        return ""
    if kind == "category":
        subject = implicit(vocabulary.category(name))[rng.integers(2)]
        return _fill(rng, BOTH[:1], subject, style) if rng.random() < 0.5 else subject
    return _fill(rng, {"both": BOTH, "object": OBJECT, "style": STYLE}[kind], with_article(name), style)


def every_caption() -> list[str]:
    """All that `draw_caption` can return but "", and categories in all templates: what the tokenizer is trained on."""
    names = [with_article(name) for name in vocabulary.objects()]
    subjects = names + [phrase for category in vocabulary.categories() for phrase in implicit(category)]
    filled = [
        t.format(object=subject, style=style) for t in BOTH for subject in subjects for style in vocabulary.STYLES
    ]
    filled += [t.format(object=name) for t in OBJECT for name in subjects]
    return filled + [t.format(style=style) for t in STYLE for style in vocabulary.STYLES]


def _fill(rng: np.random.Generator, templates: tuple[str, ...], subject: str, style: str) -> str:
    rest = len(templates) - 1
    chosen = 0 if not rest or rng.random() < 0.5 else 1 + rng.integers(rest)
    return templates[chosen].format(object=subject, style=style)
