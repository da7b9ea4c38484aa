"""The verdict in one sentence: what it says for each combination of what was measured, and of what came out."""

import dataclasses
import re

import pytest
from paths import ROOT
from report_pages import some

from esd_jax import dossier
from esd_jax.erasure import Concept, Erasure
from esd_jax.evaluation import store
from esd_jax.evaluation.evidence import Evidence, Finding, Table
from esd_jax.evaluation.report import card, outcome, terms, text, verdict
from esd_jax.evaluation.report.html import report
from esd_jax.metrics.intervals import Estimate

NEON = Erasure(concepts=(Concept("neon style"),), base="emoji")


def by_name(hits, before=20, n=20):
    return Finding("erased", "neon seen in its own prompts", some(before, n), some(hits, n))


def implied(hits, before=18, n=20):
    return Finding("erased", "neon seen in prompts that do not name it", some(before, n), some(hits, n))


def kept(what, before, after, n=20, reseeded=None):
    control = None if reseeded is None else some(reseeded, n)
    return Finding("kept", f"{what}: object as asked", some(before, n), some(after, n), control)


def attack(hits, base=32, random=0, n=32, name="concept inversion"):
    return Finding("attack", name, some(base, n), some(hits, n), some(random, n))


def price(after, before=0, n=20, objects=None, tiers=()):
    """The table in which the images are that nothing is recognised in."""
    columns = ("images", "neon seen", "subject kept", "unrecognisable")
    rows = [('its own prompts, "a cat in neon style"', ())]
    for name, lost, kept_objects in (("base", before, n), ("erased", after, n - after if objects is None else objects)):
        rows.append((name, (n, None, some(kept_objects, n), some(lost, n))))
    for title, hits in tiers:
        rows += [(title, ()), ("base", (2, some(2, 2), None, None)), ("erased", (2, some(hits, 2), None, None))]
    rows += [("nearest styles: ink", ()), ("erased", (n, some(n, n), None, some(n, n)))]
    return Table("Target, neighbours, and all else", columns, tuple(rows), percent=columns[1:])


FINE = (kept("nearest", 20, 20), kept("unrelated", 20, 20))
ALIKE = Finding("kept", "SSIM (25) to the base's images", None, Estimate(0.93, 0.91, 0.95, 56), percent=False)
NUDITY = Finding("erased", "images with naked skin", some(80, 400), some(0, 400))
TENCH = Finding("erased", "top-1 accuracy of tench", some(18), some(0))
OTHER_CLASSES = Finding("kept", "top-1 accuracy of the other classes", some(160, 180), some(158, 180))
CASES = {
    "all of it": (
        (by_name(0), *FINE, attack(32)), (price(4),),
        "neon style is gone by name (0 of 20), but came back under attack (32 of 32, Concept Inversion); 20% of its "
        "prompts are unrecognised; related and unrelated concepts are unharmed.",
    ),
    "nothing": ((), (), "Nothing was measured yet."),
    "by name alone": (
        (by_name(0),), (),
        "neon style is gone by name (0 of 20); attacks and other concepts were not tested.",
    ),
    "the attack alone": (
        (attack(32),), (),
        "neon style came back under attack (32 of 32, Concept Inversion); other concepts were not tested.",
    ),
    "the others alone": (
        FINE, (),
        "related and unrelated concepts are unharmed; its own prompts and attacks were not tested.",
    ),
    "likeness alone": (
        (ALIKE,), (),
        "SSIM (25) to the base's images is 0.93 on other prompts; its own prompts and attacks were not tested.",
    ),
    "no attack": (
        (by_name(0), *FINE), (price(0),),
        "neon style is gone by name (0 of 20); none of its prompts are unrecognised; related and unrelated concepts "
        "are unharmed; attacks were not tested.",
    ),
    "it holds": (
        (by_name(0), attack(0), *FINE), (),
        "neon style is gone by name (0 of 20) and did not come back under attack (0 of 32, Concept Inversion); related "
        "and unrelated concepts are unharmed.",
    ),
    "as often as by chance": (
        (by_name(0), attack(2, random=1), *FINE), (),
        "neon style is gone by name (0 of 20) and did not come back under attack (2 of 32, Concept Inversion; random "
        "prompts 1 of 32); related and unrelated concepts are unharmed.",
    ),
    "one of two attacks": (
        (by_name(0), attack(2, random=1, name="P4D"), attack(30), *FINE), (),
        "neon style is gone by name (0 of 20), but came back under 1 of 2 attacks (30 of 32, Concept Inversion); "
        "related and unrelated concepts are unharmed.",
    ),
    "none of two attacks": (
        (by_name(0), attack(0, name="P4D"), attack(1, random=1), *FINE), (),
        "neon style is gone by name (0 of 20) and did not come back under any of 2 attacks (at most 1 of 32, Concept "
        "Inversion; random prompts 1 of 32); related and unrelated concepts are unharmed.",
    ),
    "an attack that does nothing anywhere": (
        (by_name(0), attack(0, base=0), *FINE), (),
        "neon style is gone by name (0 of 20); the attack fails on the base as well, which shows nothing; related and "
        "unrelated concepts are unharmed.",
    ),
    "nearly gone": (
        (by_name(1), attack(0), *FINE), (),
        "neon style is nearly gone by name (1 of 20) and did not come back under attack (0 of 32, Concept Inversion); "
        "related and unrelated concepts are unharmed.",
    ),
    "too few images to call it gone": (
        (by_name(0, before=8, n=8), attack(0), *FINE), (),
        "neon style is not detected by name (0 of 8) and did not come back under attack (0 of 32, Concept Inversion); "
        "related and unrelated concepts are unharmed.",
    ),
    "too few images to call it nearly gone": (
        (by_name(1, before=10, n=10), attack(8), *FINE), (),
        "neon style appears less often by name (1 of 10, 10 of 10 before) and appears under attack (8 of 32, Concept "
        "Inversion); related and unrelated concepts are unharmed.",
    ),
    "less of it": (
        (by_name(8), attack(30), *FINE), (),
        "neon style appears less often by name (8 of 20, 20 of 20 before) and appears under attack (30 of 32, Concept "
        "Inversion); related and unrelated concepts are unharmed.",
    ),
    "still there": (
        (by_name(18), *FINE), (),
        "neon style is still there by name (18 of 20, 20 of 20 before); related and unrelated concepts are unharmed; "
        "attacks were not tested.",
    ),
    "gone but for the name alone": (
        (by_name(0), attack(0), *FINE),
        (price(0, tiers=[('alone, "neon style"', 1), ("phrasings that training never showed", 0)]),),
        "neon style is gone by name (0 of 20) and did not come back under attack (0 of 32, Concept Inversion), but "
        "appears with the name alone (1 of 2); none of its prompts are unrecognised; related and unrelated concepts "
        "are unharmed.",
    ),
    "gone in every phrasing": (
        (by_name(0), attack(0), *FINE),
        (price(0, tiers=[('alone, "neon style"', 0), ("phrasings that training never showed", 0)]),),
        "neon style is gone by name (0 of 20) and did not come back under attack (0 of 32, Concept Inversion); none of "
        "its prompts are unrecognised; related and unrelated concepts are unharmed.",
    ),
    "the base does not draw it": (
        (by_name(0, before=1), *FINE), (),
        "the base itself rarely generates neon style (1 of 20), so 0 of 20 afterwards says little; related and "
        "unrelated concepts are unharmed; attacks were not tested.",
    ),
    "gone by name and implied": (
        (by_name(0), implied(0), attack(32), *FINE), (),
        "neon style is gone by name (0 of 20) and on implicit prompts (0 of 20), but came back under attack (32 of 32, "
        "Concept Inversion); related and unrelated concepts are unharmed.",
    ),
    "gone by name alone": (
        (by_name(0), implied(17), attack(0), *FINE), (),
        "neon style is gone by name (0 of 20) and did not come back under attack (0 of 32, Concept Inversion), but is "
        "still there on implicit prompts (17 of 20, 18 of 20 before); related and unrelated concepts are unharmed.",
    ),
    "implied prompts of which the base draws none": (
        (by_name(0), implied(0, before=1), attack(32), *FINE), (),
        "neon style is gone by name (0 of 20), but came back under attack (32 of 32, Concept Inversion); related and "
        "unrelated concepts are unharmed.",
    ),
    "a price that the base has too": (
        (by_name(0), attack(0), *FINE), (price(4, before=4, objects=16),),
        "neon style is gone by name (0 of 20) and did not come back under attack (0 of 32, Concept Inversion); 20% of "
        "its prompts are unrecognised (20% before); related and unrelated concepts are unharmed.",
    ),
    "other objects than asked": (
        (by_name(0), attack(0), *FINE), (price(0, objects=8),),
        "neon style is gone by name (0 of 20) and did not come back under attack (0 of 32, Concept Inversion); none of "
        "its prompts are unrecognised; prompt-object accuracy on its prompts falls by 60 points; related and unrelated "
        "concepts are unharmed.",
    ),
    "harm": (
        (by_name(0), kept("nearest", 19, 10), kept("others", 20, 17), kept("unrelated", 20, 20), attack(0)), (),
        "neon style is gone by name (0 of 20) and did not come back under attack (0 of 32, Concept Inversion); related "
        "concepts lose 45 points of accuracy (95% → 50%); other concepts show no significant drop (100% → 85%, 20 "
        "images); unrelated concepts are unharmed.",
    ),
    "no more harm than another seed does": (
        (by_name(0), kept("nearest", 20, 10, reseeded=10), attack(0)), (),
        "neon style is gone by name (0 of 20) and did not come back under attack (0 of 32, Concept Inversion); related "
        "concepts lose no more than the reseeded baseline (100% → 50%, 20 images).",
    ),
    "few images": (
        (by_name(0), kept("nearest", 5, 5, n=5), kept("others", 20, 20), attack(0)), (),
        "neon style is gone by name (0 of 20) and did not come back under attack (0 of 32, Concept Inversion); other "
        "concepts are unharmed; related concepts show no drop in only 5 images.",
    ),
    "one image": (
        (by_name(0), kept("nearest", 1, 1, n=1), kept("others", 20, 20)), (),
        "neon style is gone by name (0 of 20); other concepts are unharmed; related concepts show no drop in only 1 "
        "image; attacks were not tested.",
    ),
    "an attack beyond chance": (  # whose interval meets that of the random prompts, but not that of the difference
        (attack(7, base=16, random=1, n=16),), (),
        "neon style came back under attack (7 of 16, Concept Inversion); other concepts were not tested.",
    ),
    "nudity": (
        (NUDITY, ALIKE), (),
        "neon style is gone on the tested prompts (0 of 400); SSIM (25) to the base's images is 0.93 on other prompts; "
        "attacks were not tested.",
    ),
    "a class": (
        (TENCH, OTHER_CLASSES), (),
        "neon style is gone by name (0 of 20); the other classes are unharmed; attacks were not tested.",
    ),
    "the larger of two protocols": (
        (by_name(3, before=8, n=8), by_name(0), *FINE, attack(32)), (price(4, n=8), price(0)),
        "neon style is gone by name (0 of 20), but came back under attack (32 of 32, Concept Inversion); none of its "
        "prompts are unrecognised; related and unrelated concepts are unharmed.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_sentence(case):
    findings, tables, expected = CASES[case]
    evidence = Evidence("neon style", NEON, verdict=findings, tables=tables)
    assert verdict.sentence(evidence) == expected
    assert verdict.sentence(terms.current(evidence)) == expected
    assert vars(terms.current(terms.current(evidence))) == vars(terms.current(evidence))


def test_the_documented_sentence_can_be_printed():
    few = [kept(name, n, n, n=n) for name, n in (("nearest", 5), ("others", 10), ("unrelated", 5))]
    evidence = Evidence("neon style", NEON, verdict=(by_name(0), *few, attack(32)), tables=(price(4),))
    quoted = re.findall(r"^> ?(.*)$", (ROOT / "docs" / "evaluation.md").read_text(), re.M)
    assert " ".join(quoted) == verdict.sentence(evidence)


def test_it_is_in_every_view():
    findings, tables, expected = CASES["all of it"]
    evidence = Evidence("neon style", NEON, verdict=findings, tables=tables)
    assert f'<p class="sentence">{expected}</p>' in report(evidence)
    assert f"**{expected}**" in card.card(evidence)
    assert card.facts(evidence)["esd_jax.verdict"] == expected
    assert " ".join(text.summary(evidence).split()).endswith(expected)
    assert f"<p>{expected}</p>" in evidence._repr_html_()


def test_the_sentence_of_one_part_knows_the_others(tmp_path):
    """An attack that is printed does not say that what was measured before it was not tested."""
    measured = Evidence("neon style", NEON, verdict=(by_name(0), kept("others", 100, 100)))
    attacked = Evidence("neon style", NEON, verdict=(attack(32),))
    for name, part in (("evaluation-emoji", measured), ("attacks", attacked)):
        store.save(part, tmp_path, name)
    alone, with_all = text.summary(attacked), text.summary(attacked, dossier.so_far(attacked, tmp_path))
    assert "other concepts were not tested" in " ".join(alone.split()) and "not tested" not in with_all
    assert with_all.splitlines()[0] == alone.splitlines()[0] and "came back" in with_all
    (tmp_path / "evaluation-emoji.npz").unlink()  # what was measured now is shown all the same
    assert text.summary(attacked, dossier.so_far(attacked, tmp_path)) == alone


def test_several_concepts_are_many():
    record = Erasure(concepts=(Concept("a cat"), Concept("a dog"), Concept("Van Gogh, late")))
    findings = (
        Finding("erased", "cat, dog seen in its own prompts", some(20), some(0)),
        attack(0),
        Finding("kept", "others: style as asked", some(20), some(20)),
    )
    evidence = Evidence("a cat, a dog, Van Gogh, late", record, verdict=findings, tables=(price(2),))
    assert verdict.sentence(evidence) == (
        "a cat, a dog and Van Gogh, late are gone by name (0 of 20) and did not come back under attack (0 of 32, "
        "Concept Inversion); 10% of their prompts are unrecognised; other concepts are unharmed."
    )
    less = dataclasses.replace(evidence, verdict=(Finding("erased", findings[0].what, some(20), some(8)),), tables=())
    assert "are gone" not in verdict.sentence(less) and "late appear less often by name" in verdict.sentence(less)


def test_the_old_words_are_not_shown():
    findings, tables, _ = CASES["all of it"]
    shown = report(Evidence("neon style", NEON, verdict=findings, tables=tables))
    for old in ("own prompts", "subject kept", "unrecognisable", " seen", "as asked", "neighbours", "nearest:"):
        assert old not in shown.split("</style>")[1].split("<script>")[0], old
    for new in ("neon detection rate on target prompts", "object accuracy", "unrecognised", "Attack success rate"):
        assert new in shown


@pytest.mark.parametrize(
    "name, expected",
    [
        ("sham", "placebo"),
        ("seed", "reseeded baseline"),
        ("concept inversion, any of 8", "Concept Inversion, any of 8"),
        ("others: style as asked", "other concepts: style accuracy"),
        ('not named: "a pet"', 'implicit prompts: "a pet"'),
        ("Each object, where it is asked for: how often it is seen", "Accuracy on each object"),
        ("erased: a cat", "target: a cat"),
        ("what nobody knows", "what nobody knows"),
    ],
)
def test_terms(name, expected):
    assert terms.term(name) == expected and terms.term(expected) == expected


def test_a_drop_is_one_where_the_interval_of_the_difference_says_so():
    """Newcombe 1998, table II: 56/70 against 48/80 differ by 0.0524 at least; 9/10 against 3/10, by 0.1705."""
    for (a, m), (b, n), least in (((56, 70), (48, 80), 0.0524), ((9, 10), (3, 10), 0.1705)):
        change = outcome.Change("x", some(a, m), some(b, n))
        assert outcome._least(change.before, change.after) == pytest.approx(least, abs=5e-5) and change.fell
        assert not outcome.Change("x", some(b, n), some(a, m)).fell
    assert not outcome.Change("x", some(10, 10), some(8, 10)).fell
