"""Which recipe an erasure starts from: by what the base is, and by what kind of concept is erased.

The same choice in Python, on the command line and in the demo. A config that is named takes its place.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

from esd_jax import families, several, suggest, wording
from esd_jax.config_files import config_names
from esd_jax.erasure import AUTO
from esd_jax.evaluation import testbed
from esd_jax.io.ldm import is_flow
from esd_jax.methods import METHODS
from esd_jax.names import KINDS, check_kind

# Family -> kind -> config: cross-attention where prompts name the concept, the rest of the network where they may not.
RECIPES: Mapping[str, Mapping[str, str]] = {
    "SD 1": {kind: f"sd14_{kind}" for kind in KINDS},
    "SD 2": {kind: "sd21_style" if kind == "attribute" else f"sd21_{kind}" for kind in KINDS},
    "SDXL": {kind: "sdxl_style" if kind == "attribute" else f"sdxl_{kind}" for kind in KINDS},
    # Of flow transformers, the text's side of the joint attention where prompts name the concept, else the image's.
    "FLUX.1 [dev]": {kind: "flux_style" if kind == "attribute" else f"flux_{kind}" for kind in KINDS},
    "FLUX.1 [schnell]": {kind: "schnell_object" if kind in ("object", "nudity") else "schnell_style" for kind in KINDS},
    **{
        called: {kind: "sd35_style" if kind == "attribute" else f"sd35_{kind}" for kind in KINDS}
        for called in ("SD 3", "SD 3.5")
    },
    "FLUX.2 [klein]": {kind: "klein_object" if kind in ("object", "nudity") else "klein_style" for kind in KINDS},
}
# What has the recipes of a testbed: this package trains such networks, in the testbed's size, and nobody else does.
RECIPES_OF: Mapping[str, str] = {"FLUX, undistilled": "emoji-flow"}
FLOW_PRESETS = ("flow", "sd3")  # what a method's settings along a rectified flow are called
NUDITY = ("nudity", "nude", "naked", "nsfw", "topless", "sexual")
BODIES = ("a", "an", "the", "and", "person", "people", "man", "men", "woman", "women", "body", "bodies", "content")


def kind_of(source: Any, concepts: Sequence[str]) -> str | None:
    """The kind of some concepts where the base, or the words themselves, leave no doubt; else None.

    Args:
      source: where the base came from ("emoji", a folder, a hub id).
      concepts: the texts to erase.
    """
    words = [set(wording.normal(text).lower().split()) for text in concepts]
    if any(named & {*NUDITY} and named <= {*NUDITY, *BODIES} for named in words):
        return "nudity"
    if concepts and all(wording.normal(text).lower().split()[-1:] == ["style"] for text in concepts):
        return "style"
    bed = testbed.of(source)
    return bed.kind(concepts) if bed and concepts else None


def config(
    source: Any,
    concepts: Sequence[str],
    configs: Callable[[], families.Configs],
    *,
    kind: str | None = None,
    fields: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The name of the config that `erase` starts from.

    Args:
      source: where the base came from ("emoji", a folder, a hub id).
      concepts: the texts to erase; none if the config names them.
      configs: gives the base's configs, which determine the family; called only if it matters.
      kind: of the concepts, one of `KINDS`; by default `kind_of`'s, or "style".
      fields: of the recipe, as the user gives them; `method` is one of `METHODS`, by default "esd".

    Raises ValueError for an unknown kind or method, an attribute without the place that it is erased from, or a method
    without a recipe for this base and kind.
    """
    method = fields.get("method")
    check_kind(kind, method)
    if kind == "attribute" and not fields.get("from_"):
        raise ValueError("kind='attribute' needs from_, the only place that it is erased from: from_='a librarian'")
    if method is not None and method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; {suggest.did_you_mean(method, METHODS)}")
    kind, method, configs = kind or kind_of(source, concepts) or "style", method or "esd", cache(configs)
    name, known = named(source, method, kind, configs), config_names()
    if name in known:
        return name
    if reason := lacking(method, configs()):
        raise ValueError(reason)
    having = [name for name in METHODS if named(source, name, kind, configs) in known and not lacking(name, configs())]
    message = (
        f"method {method!r} has no recipe for {source} and kind={kind!r} (methods that have one: "
        f"{', '.join(having) or 'none'})"
    )
    if preset := preset_of(method, configs()):
        first = preset == next(iter(METHODS[method].PRESETS))
        arguments = repr(method) if first else f"{method!r}, {preset!r}"
        message += (
            ". To use its preset, write a file my.py with two lines, `from esd_jax import recipe` and "
            f"`get_config = lambda: recipe.preset({arguments})`, and name it as the config: "
            "--config=my.py, or config='my.py' in Python"
        )
    raise ValueError(message)


def named(source: Any, method: str, kind: str, configs: Callable[[], families.Configs]) -> str:
    """The name that the config for a base, a method and a kind would have, whether or not it exists; see `config`."""
    if bed := testbed.of(source):
        return bed.config(method, kind)
    called = model(configs())
    if called in RECIPES_OF and (bed := testbed.of(RECIPES_OF[called])):
        return bed.config(method, kind)
    flow = is_flow(configs())  # of this package's; other families bring recipes of their own
    if method != "esd":
        whole = f"flow_{method}" if flow else method
        family = RECIPES[called]["style"].partition("_")[0] if called in RECIPES else ""
        own = [f"{family}_{method}_{kind}", f"{family}_{method}", f"{whole}_{kind}"]
        return next((name for name in own if name in config_names()), whole if kind in KINDS else own[-1])
    if recipes := RECIPES.get(called):
        return recipes.get(kind, f"esd_{kind}")  # some methods have more kinds
    return "flow_esd" if flow else "esd_x" if kind == "style" else "esd_u"


def preset_of(method: str, configs: families.Configs) -> str | None:
    """Which of a method's presets is for a base; None if none is."""
    presets = METHODS[method].PRESETS
    if is_flow(configs):
        return next((name for name in FLOW_PRESETS if name in presets), None)
    return next(iter(presets))


def lacking(method: str, configs: families.Configs) -> str:
    """What a base lacks for a method's preset, as a sentence; empty if nothing."""
    settings, name = METHODS[method], preset_of(method, configs)
    own = inspect.signature(settings).parameters
    values = settings.PRESETS[name] if name else {}
    needs = settings(**{field: value for field, value in values.items() if field in own}).needs
    return families.of(configs).lacks(needs, f"method {method!r}")


def as_field(kind: str, method: str) -> None:
    """Raises ValueError unless a method has a setting that is called `kind`, too, as Ablating Concepts has."""
    if "kind" not in inspect.signature(METHODS[method]).parameters:
        raise ValueError(f"kind={kind!r} chooses a config, and one is named: leave kind out")


def fitted(settings: Mapping[str, Any], concepts: Sequence[str]) -> dict[str, Any]:
    """The fields of a config for some concepts.

    Prompts that name one of these, with whatever article, are not preserved. Of several replacements ("a dog | a fox")
    those that name their own concept are left out, and a method that leads to one thing takes the first of the others.
    "auto", and what is no text, stays: the recipe reads it, or refuses it.
    """
    changes = {}
    for field in ("preserve", "replace_with"):
        value = settings.get(field)
        if not isinstance(value, str | list | tuple):
            continue
        try:
            texts = tuple(several.as_item(field, one) for one in several.parts(field, value))
        except ValueError:
            continue
        left = _preserved(texts, concepts) if field == "preserve" else _replacing(texts, concepts, settings)
        if left != texts:
            changes[field] = several.joined(field, left)
    return {**settings, **changes}


def _preserved(texts: several.Texts, concepts: Sequence[str]) -> several.Texts:
    return tuple(tuple(text for text in part if not wording.names_any(concepts, text)) for part in texts)


def _replacing(texts: several.Texts, concepts: Sequence[str], settings: Mapping[str, Any]) -> several.Texts:
    all_count = getattr(METHODS.get(settings.get("method", "esd")), "several", False) or settings.get("project")
    own = [[concept] for concept in concepts] if len(texts) == len(concepts) else [concepts] * len(texts)

    def others(part: tuple[str, ...], erased: Sequence[str]) -> tuple[str, ...]:
        if len(part) < 2 or AUTO in part:
            return part
        left = tuple(text for text in part if not wording.names_any(erased, text)) or part
        return left if all_count else left[:1]

    return tuple(map(others, texts, own))


def model(configs: families.Configs) -> str:
    """What `RECIPES` calls a base: its family, of which SD 2 is apart for its other text encoder."""
    return families.of(configs).called(configs)
