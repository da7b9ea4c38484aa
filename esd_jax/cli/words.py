"""What a person types after `esd-jax erase`: a base, a concept, and fields of the recipe as flags of their own."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from absl import flags

from esd_jax import suggest
from esd_jax.inputs import expanded

SHORT = {"-o": "--output_dir", "--output": "--output_dir"}
EMBEDDED = "emoji"


@dataclass
class Words:
    """Command-line words, sorted.

    positional: base and concept, as they were typed. config, kind: of the flags of that name.
    fields: recipe field -> its text; of a switch, "true" or "false". rest: the flags of the verb itself.
    """

    positional: list[str] = field(default_factory=list)
    config: str | None = None
    kind: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)


def read(argv: Sequence[str], verb: flags.FlagValues, fields: Collection[str], switches: Collection[str]) -> Words:
    """Sorts words. A field may be given as --FIELD or --config.FIELD, with "=" or as the next word.

    Args:
      argv: what follows the verb.
      verb: the verb's own flags.
      fields: the names of all recipe fields. switches: those that are true or false.

    Raises ValueError for an unknown flag, with the closest known one, or for one without its value.
    """
    words, found = list(argv), Words()
    while words:
        word = words.pop(0)
        if word == "--":
            found.positional += words
            break
        if not word.startswith("-") or word == "-":
            found.positional.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = SHORT.get(flag, flag)
        name = re.sub(r"^--?(config\.)?", "", re.sub(r"^--?no(config\.)", r"--\1no", flag))
        negated = name.startswith("no") and name[2:] in switches and name not in fields
        if name in ("config", "kind"):
            setattr(found, name, value if equals else _next(words, word))
        elif name in verb and not flag.startswith(("--config.", "-config.")):
            found.rest.append(word)
            if not equals and not verb[name].boolean:
                found.rest.append(_next(words, word))
        elif name in verb or (name.startswith("no") and name[2:] in verb and verb[name[2:]].boolean):
            found.rest.append(word)
        elif negated or (name in switches and not equals):
            found.fields[name[2:] if negated else name] = "false" if negated else "true"
        elif name in fields:
            found.fields[name] = value if equals else _next(words, word)
        else:
            raise ValueError(_unknown(flag, name, [*verb, *fields, "config", "kind"]))
    return found


def place(found: Words) -> None:
    """Makes fields of the positional words: [BASE] CONCEPT.

    Raises ValueError for too many, or for one that is the base alone.
    """
    match found.positional:
        case []:
            return
        case [base, concept] if not _may_be_base(base):
            raise ValueError(
                f"there is no model {base!r}: give a folder, a file, a hub id or {EMBEDDED!r}; if it belongs to the "
                f'concept, quotes: esd-jax erase "{base} {concept}"'
            )
        case [base, concept]:
            given = {"base": base, "concept": concept}
        case [one] if "concept" in found.fields:
            given = {"base": one}
        case [one] if _is_base(one):
            raise ValueError(f'name what is to be erased from {one}: esd-jax erase {one} "CONCEPT"')
        case [one]:
            given = {"concept": one}
        case [_, *several]:
            raise ValueError(
                f"unexpected argument {several[-1]!r}: put several words of a concept in quotes, as in "
                f'esd-jax erase {found.positional[0]} "{" ".join(several)}"'
            )
    for name, text in given.items():
        if name in found.fields:
            raise ValueError(f"the {name} is given twice: {text!r} and --{name}={found.fields[name]}")
    found.fields = given | found.fields


def folder_of(concept: str) -> Path:
    """The folder of a run that nobody named: "runs/neon-style"."""
    return Path("runs") / (re.sub(r"\W+", "-", concept.lower()).strip("-_")[:60] or "erased")


def check_type(name: str, text: str, kind: type) -> None:
    """Raises ValueError for a text that is no value of a recipe field's type."""
    try:
        if kind in (int, float):
            kind(text)
    except ValueError:
        form = "a whole number" if kind is int else "a number"
        raise ValueError(f"--{name}={text} must be {form}") from None
    if kind is bool and text.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"--{name}={text} must be true or false")


def _is_base(word: str) -> bool:
    path = expanded(word)
    return word == EMBEDDED or path.suffix == ".safetensors" or (path / "model_index.json").is_file()


def _may_be_base(word: str) -> bool:
    return word == EMBEDDED or "/" in word or expanded(word).exists()


def _next(words: list[str], flag: str) -> str:
    if not words:
        raise ValueError(f"{flag} needs a value: {flag}=VALUE")
    return words.pop(0)


def _unknown(flag: str, name: str, known: Sequence[str]) -> str:
    close = suggest.closest(name, known)
    hint = f"did you mean --{close}?" if close else "`esd-jax erase --help` lists the flags"
    return f"unknown flag {flag!r}: {hint}"
