"""Where a text names a phrase: as whole words, whatever the case, the spaces and the normal form of its letters."""

import re
import unicodedata

ENDING = re.compile(r"^(?:s|es|'s|’s)(?!\w)", re.IGNORECASE)  # of an English plural or genitive


def naming(phrase: str) -> re.Pattern[str]:
    """Finds a phrase in texts that `normal` returned: "cat" in "A Cat" and "two cats", not in "a cathedral".

    An English plural counts; its ending is no part of the match, so that what takes the phrase's place keeps it. In
    scripts without capital letters, many of which have no spaces either, a phrase may stand anywhere.
    """
    words = normal(phrase).split()
    inner = r"\s+".join(map(re.escape, words))
    before = r"(?<!\w)" if words and _ends_a_word(words[0][0]) else ""
    after = r"(?=(?:s|es|'s|’s)?(?!\w))" if words and _ends_a_word(words[-1][-1]) else ""
    return re.compile(f"{before}{inner}{after}", re.IGNORECASE)


def names(phrase: str, text: str) -> bool:
    """Whether a text names a phrase; the empty one is named by none."""
    return bool(phrase.strip()) and naming(phrase).search(normal(text)) is not None


def replaced(text: str, phrase: str, by: str) -> str:
    """A text with something in place of a phrase, wherever it names it."""
    return naming(phrase).sub(lambda _: by, normal(text))


def around(text: str, phrase: str) -> tuple[str, str]:
    """What stands before and behind the first place where a text names a phrase, without the plural's ending.

    Raises ValueError if there is none.
    """
    text = normal(text)
    if not names(phrase, text) or (place := naming(phrase).search(text)) is None:
        raise ValueError(f"{text!r} does not name {phrase!r}")
    return text[: place.start()], ENDING.sub("", text[place.end() :], count=1)


def normal(text: str) -> str:
    """A text in Unicode's composed form, as CLIP's tokenizer reads it."""
    return unicodedata.normalize("NFC", text)


def _ends_a_word(letter: str) -> bool:
    return letter.isdigit() or letter.lower() != letter.upper()
