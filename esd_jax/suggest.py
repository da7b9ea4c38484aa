"""The message about an unknown name: the closest one, or a few to choose from, never a list of forty."""

import difflib
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
MOST = 12  # names that a message lists


def closest(name: str, choices: Iterable[str]) -> str:
    """The choice that a name most likely means, "" if none is close.

    Case, "-" and "_" do not count. A choice is close if the name is its beginning and no other's ("learn" of
    "learning_rate"), has the initials of its words ("lr"), or differs from it in few letters ("stpes").
    """
    choices = tuple(choices)
    if alike := same(name, choices):
        return alike
    known, plain_name = {_plain(choice): choice for choice in choices}, _plain(name)
    begun = [choice for plain, choice in known.items() if plain.startswith(plain_name)] if len(plain_name) > 2 else []
    initials = [choice for plain, choice in known.items() if "".join(w[0] for w in plain.split("_") if w) == plain_name]
    for few in (begun, initials if len(plain_name) > 1 else []):
        if len(few) == 1:
            return few[0]
    matches = difflib.get_close_matches(plain_name, known, n=1)
    return known[matches[0]] if matches else ""


def same(name: str, choices: Iterable[str]) -> str:
    """The choice that a name is but for its case, "-" and "_"; "" if there is none."""
    return next((choice for choice in choices if _plain(choice) == _plain(name)), "")


def did_you_mean(name: str, choices: Collection[str], more: str = "") -> str:
    """How a message ends that refuses a name: "did you mean 'steps'?", or "choose one of ...".

    choices: where none is close, all are listed if they are at most `MOST`; of more, only their number is given, so
      `more` should name the place of the list ("docs/methods.md lists them").
    """
    if close := closest(name, choices):
        return f"did you mean {close!r}?"
    if len(choices) <= MOST:
        return f"choose one of {', '.join(choices)}"
    return f"none of the {len(choices)} names is close" + (f"; {more}" if more else "")


def keywords(
    elsewhere: Mapping[str, str], renamed: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function refuses unknown keyword arguments with the name that was probably meant.

    Args:
      elsewhere: what other libraries call an argument -> the parameter ("num_inference_steps" -> "steps"), or what to
        say of it where there is none. Parameters that the function does not have do not count.
      renamed: an argument's name in former versions -> the parameter. It is still taken, with a DeprecationWarning.

    For an unknown argument, and for one that is given by both names, the function raises TypeError, as Python does,
    before it does anything.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = inspect.signature(function).parameters

        @functools.wraps(function)
        def checked(*args: P.args, **options: P.kwargs) -> R:
            for name in [name for name in options if name not in known]:
                if (now := renamed.get(name, name)) not in known or now in options:
                    raise TypeError(_unknown(function.__name__, name, options, known, {**elsewhere, **renamed}))
                warnings.warn(f"{name}= is deprecated: it is {now}= now", DeprecationWarning, stacklevel=2)
                options[now] = options.pop(name)
            return function(*args, **options)

        return checked

    return decorate


def _unknown(
    function: str, name: str, options: Collection[str], known: Collection[str], words: Mapping[str, str]
) -> str:
    meant = words.get(name, "")
    if not meant or (meant.isidentifier() and meant not in known):  # a parameter that other functions have
        meant = closest(name, known)
    if meant in options:
        return f"{function}() is given {meant}= by two names: leave {name}= out"
    hint = f"did you mean {meant}=?" if meant in known else meant or f"it takes {', '.join(known)}"
    return f"{function}() has no argument {name!r}: {hint}"


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]+", "_", name.strip().casefold())
