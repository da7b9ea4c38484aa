"""What an erasure is measured on: groups of prompts around a target, and the noise that each image starts from."""

import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from esd_jax.demo import captions, vocabulary

# Of each style, the two whose pictures of the same objects differ least from its own, by root mean square difference.
NEAREST = {
    "cartoon": ("clay", "halftone"),
    "clay": ("halftone", "cartoon"),
    "ink": ("clay", "halftone"),
    "pixel": ("clay", "cartoon"),
    "neon": ("blueprint", "pop art"),
    "blueprint": ("neon", "pixel"),
    "halftone": ("clay", "cartoon"),
    "pop art": ("clay", "pixel"),
}
MINOR = 0.25  # the share of images of a group that completes the picture
NONSENSE = tuple(map("".join, itertools.permutations("xqzv")))  # no caption of the training has them


@dataclass(frozen=True)
class Target:
    """What is erased. kind: "style" or "object"; names: as the vocabulary has them."""

    kind: str
    names: tuple[str, ...]

    @property
    def label(self) -> str:
        """The names as one text: "neon", "cat, rose"."""
        return ", ".join(self.names)

    @property
    def concepts(self) -> list[str]:
        """The texts that are erased: "neon style", "a cat"."""
        return list(map(self._text, self.names))

    @property
    def concept(self) -> str:
        """The texts as one, for people."""
        return ", ".join(self.concepts)

    @property
    def placebo(self) -> list[str]:
        """The placebo's: as many texts of the same form, with nonsense words."""
        return list(map(self._text, NONSENSE[: len(self.names)]))

    sham = placebo  # a former name

    def _text(self, name: str) -> str:
        return captions.prompt(style=name) if self.kind == "style" else captions.prompt(name)


@dataclass(frozen=True)
class Ask:
    """A prompt, and what the probe checks: the subject (an object or, if none is named, a category) and the style."""

    prompt: str
    object: str | None = None
    category: str | None = None
    style: str | None = None


@dataclass(frozen=True)
class Group:
    """Prompts whose images are evaluated together; all ask for the same kinds of things.

    share: of the number of images that is asked for; what only completes the picture is measured on fewer.
    """

    name: str
    title: str
    asks: tuple[Ask, ...]
    share: float = 1.0

    def size(self, num_images: int) -> int:
        """How many images of this group to measure where `num_images` are asked for."""
        return max(1, round(self.share * num_images))


class Shot(NamedTuple):
    """One image: its prompt, and the seed of the noise that it starts from."""

    prompt: str
    seed: int


def parse_target(text: str) -> Target:
    """The target of one string from a user: as `find_target`, several separated by ","."""
    return find_target(text.split(","))


def find_target(concepts: Sequence[str]) -> Target:
    """The target that texts such as "neon style", "neon", "a cat" or "cat" name.

    Raises ValueError for no text, for one that the embedded model does not know, naming those that it knows, and for
    styles and objects in one target.
    """
    known = [_parse(" ".join(concept.lower().split())) for concept in concepts]
    kinds, names = {kind for kind, _ in known}, tuple(name for _, name in known)
    if len(kinds) != 1 or len(set(names)) < len(names):
        raise ValueError(f"{', '.join(concepts)!r} is no target: name styles alone or objects alone, each once")
    return Target(kinds.pop(), names)


def _parse(words: str) -> tuple[str, str]:
    """Kind and name."""
    style = words.removesuffix(" style")
    if style in vocabulary.styles():
        return "style", style
    for name in vocabulary.objects():
        if words in (name, captions.with_article(name), f"the {name}"):
            return "object", name
    raise ValueError(
        f"the embedded model does not know {words!r}: choose a style ({', '.join(vocabulary.styles())}) "
        f"or an object ({', '.join(vocabulary.objects())})"
    )


def groups(target: Target) -> tuple[Group, ...]:
    """The groups that an erasure is evaluated on: the target, then related concepts, then unrelated ones.

    Of a style: the target prompts over all objects, the style alone, held-out phrasings, the nearest
    styles (`NEAREST`), the other styles, objects without a style. No prompt implies a style without naming it.
    Of an object: the target prompts in all styles, the object alone, held-out phrasings, the prompts
    that imply its category without naming it, the other objects of its category, all other objects, styles alone.

    The name alone holds the first two tiers of EMMA (arXiv 2512.17320), Name and Prefix; the implicit prompts are its
    Short description. No group holds the prompts of another, so that nothing is counted twice.
    """
    near = _style_groups(target.names) if target.kind == "style" else _object_groups(target.names)
    return tuple(group for group in near if group.asks)  # a long list may leave nothing near it


def base_groups() -> tuple[Group, ...]:
    """The groups that the model itself is evaluated on: training pairs, held-out pairs, and the other prompts."""
    objects, styles = vocabulary.objects(), vocabulary.styles()
    unseen = sorted(vocabulary.held_out())
    return (
        Group("pairs", "training pairs", _pairs(vocabulary.pairs(unseen=False))),
        Group("unseen", "held-out pairs", _pairs(unseen), 0.5),
        Group("phrasings", "held-out phrasings", _phrasings(vocabulary.pairs()), MINOR),
        Group("objects", "objects without a style", tuple(Ask(captions.prompt(o), object=o) for o in objects), 0.5),
        Group("styles", "styles without an object", _styles_alone(styles), 0.5),
        Group(
            "implicit",
            "implicit prompts: categories of objects",
            sum((_implicit(c) for c in vocabulary.categories()), ()),
            MINOR,
        ),
    )


def shots(group: Group, num_images: int, seed: int) -> list[tuple[Ask, Shot]]:
    """The group's images: its prompts in a fixed, mixed order, again and again.

    The noise depends on (seed, prompt, how often the prompt came before) alone: two models start from the same, and
    groups that share prompts share images.
    """
    order = np.random.default_rng(0).permutation(len(group.asks))
    chosen = [(group.asks[order[i % len(order)]], i // len(order)) for i in range(num_images)]
    return [(ask, Shot(ask.prompt, zlib.crc32(f"{seed} {again} {ask.prompt}".encode()))) for ask, again in chosen]


def examples(target: Target) -> list[tuple[str, list[str]]]:
    """The prompts of the before/after picture, in titled groups, without those for which a long list leaves nothing."""
    titled = _style_examples(target) if target.kind == "style" else _object_examples(target)
    return [(title, prompts) for title, prompts in titled if prompts]


def _style_examples(target: Target) -> list[tuple[str, list[str]]]:
    subjects, others = ("cat", "rocket", "house", "rose"), _nearest(target.names)
    far = [s for s in vocabulary.styles() if s not in (*target.names, *others)] or others
    own = [captions.prompt(o, s) for o, s in zip(subjects, itertools.cycle(target.names), strict=False)]
    kept = [*zip(("cat", "house"), others, strict=False), *zip(("rocket", "rose"), far[:1] + far[-1:], strict=False)]
    return [
        (f"target: {target.concept}", own),
        ("related: other styles", [captions.prompt(o, s) for o, s in kept]),
        ("unrelated: no style", [captions.prompt(o) for o in ("cat", "pizza", "robot")]),
    ]


def _object_examples(target: Target) -> list[tuple[str, list[str]]]:
    four = zip(itertools.cycle(target.names), ("cartoon", "neon", "pixel", None), strict=False)
    categories = _categories(target.names)
    same = [o for category in categories for o in vocabulary.members(category)]
    near = [o for o in same if o not in target.names]
    far = [o for o in ("house", "rose", "pizza", "robot", "owl", "fish", "car") if o not in same]
    return [
        (f"target: {target.concept}", [captions.prompt(o, s) for o, s in four]),
        ("implicit prompts", [captions.implicit(categories[0])[0]]),
        (
            "related: same category",
            [captions.prompt(o, s) for o, s in zip(itertools.cycle(near), ("cartoon", "neon"), strict=False)],
        ),
        ("unrelated", [captions.prompt(o, s) for o, s in zip(far, ("clay", "ink", "neon", "halftone"), strict=False)]),
    ]


def _nearest(names: tuple[str, ...]) -> list[str]:
    """The styles that are nearest to any of some styles, and none of them."""
    return [s for s in dict.fromkeys(s for name in names for s in NEAREST[name]) if s not in names]


def _categories(names: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(map(vocabulary.category, names)))


def _style_groups(names: tuple[str, ...]) -> tuple[Group, ...]:
    objects, nearest = vocabulary.objects(), _nearest(names)
    own = [(o, name) for name in names for o in objects]
    others = [s for s in vocabulary.styles() if s not in (*names, *nearest)]
    return (
        Group("own", f"target prompts, {_quoted(own)}", _pairs(own)),
        Group(
            "alone", f'target prompts, the name alone: "{captions.prompt(style=names[0])}"', _styles_alone(names), MINOR
        ),
        Group("phrasings", "target prompts, held-out phrasings", _phrasings(own), MINOR),
        Group(
            "nearest",
            f"related concepts, nearest styles: {', '.join(nearest)}",
            _pairs([(o, s) for s in nearest for o in objects]),
            0.5,
        ),
        Group(
            "others", f"other concepts, styles: {', '.join(others)}", _pairs([(o, s) for s in others for o in objects])
        ),
        Group(
            "unrelated",
            "unrelated concepts, objects without a style",
            tuple(Ask(captions.prompt(o), object=o) for o in objects),
            MINOR,
        ),
    )


def _object_groups(names: tuple[str, ...]) -> tuple[Group, ...]:
    styles, categories = vocabulary.styles(), _categories(names)
    own = [(name, s) for name in names for s in styles]
    same = [o for category in categories for o in vocabulary.members(category) if o not in names]
    others = [o for o in vocabulary.objects() if vocabulary.category(o) not in categories]
    alone = tuple(Ask(t.format(object=captions.with_article(o)), object=o) for o in names for t in captions.OBJECT)
    implied = " or ".join(f'"{prompt}"' for category in categories for prompt in captions.implicit(category))
    return (
        Group("own", f"target prompts, {_quoted(own)}", _pairs(own)),
        Group("alone", f'target prompts, the name alone: "{captions.prompt(names[0])}"', alone, MINOR),
        Group("phrasings", "target prompts, held-out phrasings", _phrasings(own), MINOR),
        Group("implicit", f"implicit prompts: {implied}", sum(map(_implicit, categories), ())),
        Group(
            "nearest",
            f"related concepts, same category: {', '.join(same)}",
            _pairs([(o, s) for o in same for s in styles]),
            0.5,
        ),
        Group("others", "other concepts, all other objects", _pairs([(o, s) for o in others for s in styles])),
        Group("unrelated", "unrelated concepts, styles without an object", _styles_alone(styles), MINOR),
    )


def _pairs(pairs: Iterable[tuple[str, str]]) -> tuple[Ask, ...]:
    return tuple(Ask(captions.prompt(o, s), object=o, style=s) for o, s in pairs)


def _phrasings(pairs: Iterable[tuple[str, str]]) -> tuple[Ask, ...]:
    return tuple(Ask(prompt, object=o, style=s) for o, s in pairs for prompt in captions.paraphrases(o, s))


def _styles_alone(styles: Iterable[str]) -> tuple[Ask, ...]:
    return tuple(Ask(template.format(style=s), style=s) for s in styles for template in captions.STYLE)


def _implicit(category: str) -> tuple[Ask, ...]:
    """Without a style and in each; the style is not checked, since not all prompts ask for one."""
    subjects = captions.implicit(category)
    plain = [Ask(subject, category=category) for subject in subjects]
    template = captions.BOTH[0]
    filled = [template.format(object=subject, style=s) for subject in subjects for s in vocabulary.styles()]
    return (*plain, *(Ask(prompt, category=category) for prompt in filled))


def _quoted(pairs: list[tuple[str, str]]) -> str:
    return f'"{captions.prompt(*pairs[0])}"'
