"""The field's terms for what evidence files name.

Evidence of earlier versions has other words; all views (page, card, terminal, notebook) show it through `current`, and
compare runs of all ages by what that gives.
"""

import re
from dataclasses import replace

from esd_jax.evaluation.evidence import Evidence, Finding, Heat, Plot, Table

# Groups of prompts, as findings name them -> the concepts that they ask for.
CONCEPTS = {"nearest": "related concepts", "others": "other concepts", "unrelated": "unrelated concepts"}
NAMES = {
    "sham": "placebo",
    "seed": "reseeded baseline",
    "its own prompts": "target prompts",
    "concept inversion": "Concept Inversion",
    "list of prompts": "prompt list",
    "subject kept": "object accuracy",
    "style kept": "style accuracy",
    "unrecognisable": "unrecognised",
    "target seen": "target detection rate",
    "others kept": "accuracy on other concepts",
    "Target, neighbours, and all else": "Target, related and unrelated concepts",
    "Likeness to the base": "Similarity to the base",
    "not named": "implicit prompts",
    "kept: other styles": "related: other styles",
    "kept: same category": "related: same category",
    "Training": "Mean loss of neighbouring steps",
    "update": "step",
    "Attacks": "Attack success rates",
}
PATTERNS = (
    (r"(?P<x>.+) seen in its own prompts", r"\g<x> detection rate on target prompts"),
    (r"(?P<x>.+) seen in prompts that do not name it", r"\g<x> detection rate on implicit prompts"),
    (r"(?P<group>nearest|others|unrelated): (?P<x>\w+) as asked", None),
    (r"its own prompts, (?P<x>.+)", r"target prompts, \g<x>"),
    (r"its own prompts, any of (?P<x>\d+)", r"target prompts, any of \g<x>"),
    (r"concept inversion, any of (?P<x>\d+)", r"Concept Inversion, any of \g<x>"),
    (r"alone, (?P<x>.+)", r"target prompts, the name alone: \g<x>"),
    (r"phrasings that training never showed", "target prompts, held-out phrasings"),
    (r"not named: (?P<x>.+)", r"implicit prompts: \g<x>"),
    (r"nearest styles: (?P<x>.+)", r"related concepts, nearest styles: \g<x>"),
    (r"same category: (?P<x>.+)", r"related concepts, same category: \g<x>"),
    (r"other styles: (?P<x>.+)", r"other concepts, styles: \g<x>"),
    (r"all other objects", "other concepts, all other objects"),
    (r"unrelated: (?P<x>(objects|styles) without .+)", r"unrelated concepts, \g<x>"),
    (r"Each (?P<x>style|object), where it is asked for: how often it is seen", r"Accuracy on each \g<x>"),
    (r"(?P<x>.+) seen", r"\g<x> detection rate"),
)
# Sentences of notes and caveats.
SENTENCES = (
    ("Seen: the probe recognises the target.", "Detection rate: share of images in which the probe finds the target."),
    (
        "Kept: it recognises the object (or category) and the style that the prompt asks for.",
        "Accuracy: the probe recognises the object (or category), or the style, that the prompt asks for.",
    ),
    ("Unrecognisable: it recognises nothing;", "Unrecognised: the probe recognises nothing;"),
    ("SSIM: likeness to the base's image", "SSIM: similarity to the base's image"),
    (
        "sham: the same recipe, erasing a word that means nothing. seed: the base model from other noise.",
        "Placebo: the same recipe, erasing a nonsense word. Reseeded baseline: the base model from other noise.",
    ),
    (
        "Shares of images in which the concept is seen.",
        "Attack success rate: share of images in which the concept is detected.",
    ),
    (
        "An attack says something where it succeeds on the base, and neither random prompts nor random weights do.",
        "An attack is informative if it succeeds on the base, and neither random prompts nor random weights do.",
    ),
    ("Likeness of the erased model's images", "Similarity of the erased model's images"),
    (
        "The model is a small one that draws emoji, and what is seen is what its probe sees: a classifier, which errs.",
        "The model is a small one that draws emoji. Its detector is a classifier, which makes mistakes.",
    ),
    (
        "An erased model may still draw the concept for prompts that nobody tried.",
        "An erased model may still draw the concept for prompts that were not tested.",
    ),
    (
        "A detector errs, and an erased model may still draw the concept for prompts that nobody tried.",
        "A detector makes mistakes, and an erased model may still draw the concept for prompts that were not tested.",
    ),
)


def current(evidence: Evidence) -> Evidence:
    """The same evidence in the terms of today; of what has them already, itself."""
    return replace(
        evidence,
        verdict=tuple(map(_finding, evidence.verdict)),
        tables=tuple(map(of_table, evidence.tables)),
        attacks=tuple(map(of_table, evidence.attacks)),
        pictures={term(name): pairs for name, pairs in evidence.pictures.items()},
        attack_pictures={term(name): pairs for name, pairs in evidence.attack_pictures.items()},
        heat=evidence.heat and _heat(evidence.heat),
        front=evidence.front and _plot(evidence.front),
        training=evidence.training and _plot(evidence.training),
        caveats=tuple(map(sentences, evidence.caveats)),
    )


def term(name: str) -> str:
    """A label in today's terms: a row, a column, a title, or what a finding counts."""
    if name in NAMES:
        return NAMES[name]
    if name.startswith("erased: "):
        return f"target: {name.removeprefix('erased: ')}"
    for pattern, shown in PATTERNS:
        if match := re.fullmatch(pattern, name):
            return match.expand(shown) if shown else f"{CONCEPTS[match['group']]}: {match['x']} accuracy"
    return name


def sentences(text: str) -> str:
    """A note or a caveat in today's terms."""
    for old, new in SENTENCES:
        text = text.replace(old, new)
    return text


def _finding(finding: Finding) -> Finding:
    return replace(finding, what=term(finding.what))


def of_table(table: Table) -> Table:
    """A table in today's terms."""
    return Table(
        term(table.title),
        tuple(map(term, table.columns)),
        tuple((term(label), cells) for label, cells in table.rows),
        sentences(table.note),
        tuple(map(term, table.percent)),
    )


def _heat(heat: Heat) -> Heat:
    return replace(heat, title=term(heat.title), rows=tuple(map(term, heat.rows)))


def _plot(plot: Plot) -> Plot:
    return replace(plot, title=term(plot.title), x=term(plot.x), y=term(plot.y))
