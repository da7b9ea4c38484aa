"""Prompts that a concept is erased from beside its own name, each led to the same prompt without the concept.

A text encoder reads a concept in a sentence differently from alone: what is learned on "ink style" reaches "a cat in
ink style" only in part, and takes some of the cat along. A context holds the prompt and what should remain of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from esd_jax.erasing.concepts import Concept

NAME = "{}"  # stands for the concept


@dataclass(frozen=True)
class Context:
    """prompt: "a dog in {}", in which {} stands for the concept.

    without: what it becomes, "a dog"; "" is the empty prompt. In it, {} stands for what replaces the concept.
    """

    prompt: str
    without: str

    def becomes(self, guide: str) -> str:
        """What the prompt becomes; where the guide is empty, {} goes with the spaces beside it."""
        return " ".join(self.without.replace(NAME, guide).split())


def parse(text: str | None) -> tuple[Context, ...]:
    """The contexts of "a dog in {}: a dog | {} in ink style: {} in ink style".

    Raises ValueError for a part without ":", or without {} before it.
    """
    contexts = []
    for part in filter(None, (part.strip() for part in (text or "").split("|"))):
        prompt, separator, without = (side.strip() for side in part.partition(":"))
        if not separator or NAME not in prompt:
            raise ValueError(
                f"contexts has {part!r}: each is a prompt with {NAME} for the concept, ':', and the same without it, "
                f"as 'a dog in {NAME}: a dog'; several are separated by '|'"
            )
        contexts.append(Context(prompt, without))
    return tuple(contexts)


def pairs(contexts: Sequence[Context], concept: str, guide: str) -> list[tuple[str, str]]:
    """The prompts of a concept, and what each becomes."""
    return [(context.prompt.replace(NAME, concept), context.becomes(guide)) for context in contexts]


def expanded(concepts: Sequence[Concept], contexts: Sequence[Context]) -> list[Concept]:
    """Each concept alone, then, for each context, erased from its prompt, with the rest of the prompt in its place.

    Raises ValueError for a concept with `from_`.
    """
    rows = []
    for concept in concepts:
        if contexts and concept.from_ is not None:
            raise ValueError(f"contexts are for concepts that are erased everywhere: {concept.text!r} has from_")
        rows.append(concept)
        for context in contexts:
            prompt = context.prompt.replace(NAME, concept.text)
            rows.append(replace(concept, from_=prompt, replace_with=(context.becomes(concept.anchor),)))
    return rows
