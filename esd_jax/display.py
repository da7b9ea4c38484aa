"""How the package's objects show themselves: one line for a terminal, a small card in a notebook."""

from collections.abc import Iterable, Mapping
from html import escape

WIDTH = 199  # characters of a line, at most
CARD = (
    "display:inline-block;border:1px solid rgba(128,128,128,.4);border-radius:6px;padding:.6em 1em;"
    "font-family:system-ui,sans-serif;line-height:1.4"
)
CELL = "text-align:left;vertical-align:top;padding:.1em 1em .1em 0;border:none;background:none"


def line(kind: str, name: str, facts: Iterable[str]) -> str:
    """ "<KIND NAME: FACT, FACT>", cut where it would be longer than `WIDTH`."""
    text = ": ".join(filter(None, [f"{kind} {name}", ", ".join(filter(None, facts))]))
    return f"<{shortened(text, WIDTH - 2)}>"


def shortened(text: str, width: int) -> str:
    """A text on one line of so many characters at most."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 3].rstrip()}..."


def card(title: str, facts: Mapping[str, str]) -> str:
    """A card in HTML: a title, and names beside what they stand for; empty ones are left out. All text is escaped."""
    rows = "".join(
        f'<tr style="background:none"><td style="{CELL};opacity:.7">{escape(name)}</td>'
        f'<td style="{CELL}">{escape(value)}</td></tr>'
        for name, value in facts.items()
        if value
    )
    return f'<div style="{CARD}"><b>{escape(title)}</b><table style="margin:.4em 0 0">{rows}</table></div>'


def count(number: int) -> str:
    """A large number in three figures at most: "9 M", "860 M", "2.6 B"."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            value = number / unit
            return f"{value:.1f} {name}" if unit == 10**9 and value < 10 else f"{value:.0f} {name}"
    return str(number)
