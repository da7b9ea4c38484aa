"""What a person types after `esd-jax erase`: a base, a concept, and fields of the recipe as flags of their own."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from absl import flags

from esd_jax import demo, prompt_files
from esd_jax.cli import common
from esd_jax.inputs import expanded
from esd_jax.training import run_folder

EMBEDDED = "emoji"
CARRIED = demo.NAMES  # all models that the package carries


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
      verb: the flags of the verb itself, which come first where a field has the same name.
      fields: the names of all recipe fields. switches: those that are true or false.

    Raises ValueError for an unknown flag, with the closest known one, or for one without its value.
    """
    words, parsed = list(argv), Words()
    while words:
        word = words.pop(0)
        if word == "--":
            parsed.positional += words
            break
        if not word.startswith("-") or word == "-":
            parsed.positional.append(word)
            continue
        flag, equals, value = word.partition("=")
        dotted = re.fullmatch(r"--?(no)?config\.(.+)", flag)
        name = (dotted[1] or "") + dotted[2] if dotted else flag.lstrip("-")
        if not dotted and name in ("o", "output"):
            name = "output" if "output" in verb else "output_dir"
        if not dotted and name in ("config", "kind"):
            setattr(parsed, name, value if equals else _next(words, word))
        elif not dotted and (own := _own(verb, name)) is not None:
            text = f"={_next(words, word)}" if not own.boolean and not equals else ""
            parsed.rest.append(f"--{name}{equals}{value}{text}")
        elif name in ("flagfile", "undefok"):  # absl's
            parsed.rest.append(word)
        elif name in switches and not equals:
            parsed.fields[name] = "true"
        elif name.startswith("no") and name[2:] in switches:
            parsed.fields[name[2:]] = "false"
        elif dotted or name in fields:
            parsed.fields[name] = value if equals else _next(words, word)
        else:
            raise ValueError(common.unknown_flag(flag, [*verb, *fields, "config", "kind"]))
    return parsed


def place(parsed: Words) -> None:
    """Makes fields of the positional words: [BASE] CONCEPT.

    Raises ValueError for too many, or for one that is the base alone.
    """
    match parsed.positional:
        case []:
            return
        case [base, concept] if not _may_be_base(base):
            raise ValueError(
                f"there is no model {base!r}: give a folder, a file, a hub id or one of {', '.join(CARRIED)}; if it "
                f'belongs to the concept, quotes: esd-jax erase "{base} {concept}"'
            )
        case [base, concept]:
            fields = {"base": base, "concept": concept}
        case [one] if "concept" in parsed.fields or (parsed.config and _is_base(one)):
            fields = {"base": one}
        case [one] if _is_base(one):
            raise ValueError(
                f'name what is to be erased from {one}: esd-jax erase {one} "CONCEPT" '
                f'(if that is the concept: --concept="{one}")'
            )
        case [one]:
            fields = {"concept": one}
        case [_, *several]:
            raise ValueError(
                f"unexpected argument {several[-1]!r}: put several words of a concept in quotes, as in "
                f'esd-jax erase {parsed.positional[0]} "{" ".join(several)}"'
            )
    for name, text in fields.items():
        if name in parsed.fields:
            raise ValueError(f"the {name} is given twice: {text!r} and --{name}={parsed.fields[name]}")
    parsed.fields = fields | parsed.fields


def fill(parsed: Words) -> None:
    """Puts the names of a file in place of a concept @FILE: one a line, or the column "prompt" of a CSV.

    What begins with "#" is a comment.

    Raises ValueError for a file without names, or for a name with ";", and OSError for one that cannot be read.
    """
    concept = parsed.fields.get("concept", "")
    if concept.startswith("@") and len(concept) > 1:
        names = [name for name in prompt_files.read(expanded(concept[1:])) if not name.startswith("#")]
        if not names:
            raise ValueError(f"{concept[1:]} holds comments alone: name a concept")
        if split := next((name for name in names if ";" in name), None):
            raise ValueError(f"{concept[1:]} has the name {split!r}, which ';' would separate: give each its own line")
        parsed.fields["concept"] = "; ".join(names)
        if not {"output_dir", "output"} & parsed.fields.keys():
            parsed.fields["output_dir"] = str(folder_of(Path(concept[1:]).stem))


def folder_of(concept: str) -> Path:
    """The folder of a run that nobody named: "runs/neon-style"."""
    return Path("runs") / run_folder.name_of(concept)


def check_type(name: str, text: str, kind: type) -> None:
    """Raises ValueError for a text that is no value of a recipe field's type."""
    try:
        if kind is int:
            int(text, 0)
        elif kind is float:
            float(text)
    except ValueError:
        form = "a whole number" if kind is int else "a number"
        raise ValueError(f"--{name}={text} must be {form}") from None
    if kind is bool and text.lower() not in ("true", "false", "t", "f", "1", "0"):
        raise ValueError(f"--{name}={text} must be true or false")


def _is_base(word: str) -> bool:
    path = expanded(word)
    files = path.suffix == ".safetensors" or any((path / name).is_file() for name in ("model_index.json", "run.json"))
    return word in CARRIED or files or re.fullmatch(r"[\w.-]+/[\w.-]+", word) is not None


def _may_be_base(word: str) -> bool:
    return word in CARRIED or "/" in word or expanded(word).exists()


def _next(words: list[str], flag: str) -> str:
    if not words:
        raise ValueError(f"{flag} needs a value: {flag}=VALUE")
    return words.pop(0)


def _own(verb: flags.FlagValues, name: str) -> flags.Flag | None:
    """A flag of the verb itself, by its name, or of a switch by --noNAME."""
    if name in verb:
        return verb[name]
    switch = verb[name[2:]] if name.startswith("no") and name[2:] in verb else None
    return switch if switch is not None and switch.boolean else None
