"""What the successor of the embedded model knows: objects, their categories, styles, and held-out pairs."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Object:
    """One emoji. `label` is its Unicode name, under which every artwork package lists it."""

    name: str
    category: str
    hexcode: str
    label: str


def _category(name: str, *members: tuple[str, str, str]) -> list[Object]:
    return [Object(member, name, hexcode, label) for member, hexcode, label in members]


OBJECTS: tuple[Object, ...] = (
    *_category(
        "pet",
        ("cat", "1F431", "cat face"),
        ("dog", "1F436", "dog face"),
        ("rabbit", "1F430", "rabbit face"),
    ),
    *_category(
        "wild animal",
        ("lion", "1F981", "lion"),
        ("panda", "1F43C", "panda"),
        ("fox", "1F98A", "fox"),
        ("frog", "1F438", "frog"),
    ),
    *_category(
        "farm animal",
        ("cow", "1F42E", "cow face"),
        ("pig", "1F437", "pig face"),
        ("chick", "1F424", "baby chick"),
    ),
    *_category("bird", ("penguin", "1F427", "penguin"), ("owl", "1F989", "owl")),
    *_category(
        "sea creature",
        ("fish", "1F41F", "fish"),
        ("octopus", "1F419", "octopus"),
        ("crab", "1F980", "crab"),
        ("whale", "1F433", "spouting whale"),
    ),
    *_category(
        "insect",
        ("butterfly", "1F98B", "butterfly"),
        ("bee", "1F41D", "honeybee"),
        ("ladybug", "1F41E", "lady beetle"),
    ),
    *_category(
        "flower",
        ("rose", "1F339", "rose"),
        ("tulip", "1F337", "tulip"),
        ("sunflower", "1F33B", "sunflower"),
    ),
    *_category(
        "fruit",
        ("apple", "1F34E", "red apple"),
        ("banana", "1F34C", "banana"),
        ("strawberry", "1F353", "strawberry"),
    ),
    *_category("snack", ("pizza", "1F355", "pizza"), ("hamburger", "1F354", "hamburger")),
    *_category(
        "dessert",
        ("doughnut", "1F369", "doughnut"),
        ("ice cream", "1F366", "soft ice cream"),
        ("cake", "1F382", "birthday cake"),
    ),
    *_category(
        "vehicle",
        ("car", "1F697", "automobile"),
        ("bus", "1F68C", "bus"),
        ("sailboat", "26F5", "sailboat"),
    ),
    *_category("flying machine", ("airplane", "2708", "airplane"), ("rocket", "1F680", "rocket")),
    *_category("building", ("house", "1F3E0", "house"), ("castle", "1F3F0", "castle")),
    *_category(
        "spooky thing",
        ("skull", "1F480", "skull"),
        ("ghost", "1F47B", "ghost"),
        ("pumpkin", "1F383", "jack-o-lantern"),
    ),
    *_category("thing in the sky", ("sun", "1F31E", "sun with face"), ("star", "2B50", "star")),
    *_category("toy", ("robot", "1F916", "robot"), ("guitar", "1F3B8", "guitar")),
)
STYLES = ("cartoon", "clay", "ink", "pixel", "neon", "blueprint", "halftone", "pop art")
# Prompts that imply a category without naming it or any object.
KEYWORDS = {
    "pet": "a furry friend",
    "wild animal": "something wild",
    "farm animal": "something from the farm",
    "bird": "something with a beak",
    "sea creature": "something from the sea",
    "insect": "a little bug",
    "flower": "something that blooms",
    "fruit": "something healthy to eat",
    "snack": "fast food",
    "dessert": "something sweet",
    "vehicle": "something to travel in",
    "flying machine": "something that flies fast",
    "building": "a place to live",
    "spooky thing": "something scary",
    "thing in the sky": "something that shines",
    "toy": "something to play with",
}
NUM_HELD_OUT = 24


def objects() -> tuple[str, ...]:
    """The objects' names, in the order of the probe's classes."""
    return tuple(o.name for o in OBJECTS)


def styles() -> tuple[str, ...]:
    """The styles' names, in the order of the probe's classes."""
    return STYLES


def categories() -> tuple[str, ...]:
    """The categories' names, in the order of the probe's classes."""
    return tuple(dict.fromkeys(o.category for o in OBJECTS))


def category(name: str) -> str:
    """The category of an object. Raises KeyError for an object that the model does not know."""
    return {o.name: o.category for o in OBJECTS}[name]


def members(of: str) -> tuple[str, ...]:
    """The objects of a category."""
    return tuple(o.name for o in OBJECTS if o.category == of)


def held_out() -> frozenset[tuple[str, str]]:
    """The (object, style) pairs that the model was never shown: three of each style, no object twice.

    They are held out from the training of the UNet and the text encoder; the VAE, which knows no words, saw all pairs.
    """
    names = objects()
    # 13 is coprime to the number of objects, so no object comes twice; only buildings have no pair.
    return frozenset((names[(13 * i + 5) % len(names)], STYLES[i % len(STYLES)]) for i in range(NUM_HELD_OUT))


def pairs(without: Sequence[str] = (), *, unseen: bool = True) -> list[tuple[str, str]]:
    """Every (object, style), objects first to vary, without some styles and, if asked, without the held-out pairs."""
    excluded = frozenset() if unseen else held_out()
    return [(name, s) for s in STYLES if s not in without for name in objects() if (name, s) not in excluded]
