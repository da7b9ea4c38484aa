"""Where a text names a phrase: as whole words, whatever the case, the spaces and the normal form of its letters.

"cat" is named by "A Cat" and "two cats", not by "a cathedral". A word ends where a letter without capitals stands, as
in scripts without spaces: "Monet" is named by "Monet風の絵", and "猫" by "黒猫".
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator

SIBILANTS = ("s", "x", "z", "ch", "sh")  # after which an English plural ends in "es"
ARTICLES = frozenset({"a", "an", "the"})
ARTICLE = re.compile(rf"\s*(?:{'|'.join(sorted(ARTICLES))})\s+", re.IGNORECASE)
ENDING = re.compile(r"'s|’s|es|s", re.IGNORECASE)  # of a plural or genitive


def names(phrase: str, text: str) -> bool:
    """Whether a text names a phrase; the empty one is named by none."""
    return next(_places(phrase, normal(text)), None) is not None


def names_any(phrases: Iterable[str], text: str) -> bool:
    """Whether a text names any of some phrases, with whatever article."""
    return any(names(one, text) for phrase in phrases for one in (phrase, bare(phrase)))


def replaced(text: str, phrase: str, by: str) -> str:
    """A text with something in place of a phrase, wherever it names it; a plural stays one."""
    text, parts, last = normal(text), [], 0
    for start, end, ending in _places(phrase, text):
        if ending.lower() in ("s", "es"):
            ending = "es" if by.lower().endswith(SIBILANTS) else "s"
        parts += [text[last:start], by, ending]
        last = end
    return "".join([*parts, text[last:]])


def around(text: str, phrase: str) -> tuple[str, str]:
    """What stands before and behind the first place where a text names a phrase, without the plural's ending.

    Raises ValueError if there is none.
    """
    text = normal(text)
    if (place := next(_places(phrase, text), None)) is None:
        raise ValueError(f"{text!r} does not name {phrase!r}")
    return text[: place[0]], text[place[1] :]


def normal(text: str) -> str:
    """A text in Unicode's composed form, as CLIP's tokenizer reads it."""
    return unicodedata.normalize("NFC", text)


def bare(phrase: str) -> str:
    """A phrase without its article: "cat" for "the cat", so that "a cat" names it, too."""
    article = ARTICLE.match(phrase)
    return phrase[article.end() :] if article else phrase


def same(one: str, other: str) -> bool:
    """Whether two texts are one but for case, normal form and the spaces around them."""
    return normal(one).strip().lower() == normal(other).strip().lower()


def _places(phrase: str, text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, the ending before it) of every place where a text in normal form names a phrase."""
    words = normal(phrase).split()
    if not words:
        return
    last = 0
    for match in re.finditer(r"\s+".join(map(re.escape, words)), text, re.IGNORECASE):
        start, end = match.span()
        if start < last or (_in_a_word(match[0][0]) and start and _in_a_word(text[start - 1])):
            continue
        ending = ""
        if _in_a_word(match[0][-1]) and _starts_in_a_word(text, end):
            suffix = ENDING.match(text, end)
            if suffix is None or _starts_in_a_word(text, suffix.end()):
                continue
            if suffix[0].lower() == "es" and not match[0].lower().endswith((*SIBILANTS, "o")):
                continue
            ending = suffix[0]
        elif (suffix := re.match(r"['’]s", text[end:], re.IGNORECASE)) and not _starts_in_a_word(text, end + 2):
            ending = suffix[0]
        last = end + len(ending)
        yield start, last, ending


def _starts_in_a_word(text: str, at: int) -> bool:
    return at < len(text) and _in_a_word(text[at])


def _in_a_word(letter: str) -> bool:
    return letter == "_" or letter.isdigit() or letter.lower() != letter.upper()
