"""The report, the comparison and the card: what they say, and that they say it safely."""

import base64
import dataclasses
import hashlib
import re
import shlex
from html.parser import HTMLParser

import pytest
from report_pages import ABOUT, EVIL, PAGES, all_pages, evidence, pairs, some

from esd_jax import recipe
from esd_jax.cli import VERBS
from esd_jax.erasure import Erasure
from esd_jax.evaluation.evidence import Curve, Evidence, Finding, Heat, Table
from esd_jax.evaluation.report import card, rounds
from esd_jax.evaluation.report.comparison import compare
from esd_jax.evaluation.report.html import COMMANDS, report

VOID = {"meta", "link", "img", "br", "input", "hr"}
SECTIONS = ("measured", "interference", "attacks", "timeline", "front", "weights", "training")


class Read(HTMLParser):
    """A page's elements and text; fails on tags that are not closed in their order."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.text = [], [], {}
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        for tag in {*self.open}:
            self.text[tag] = self.text.get(tag, "") + data

    def all(self, *tags):
        return [attrs for tag, attrs, _ in self.elements if tag in tags]


@pytest.fixture(scope="module")
def pages():
    return all_pages()


@pytest.fixture(params=PAGES)
def source(request, pages):
    return pages[request.param]


def test_a_page_can_ask_for_nothing_and_runs_its_own_script_alone(source):
    read = Read(source)
    (style,) = re.findall(r"<style>(.*?)</style>", source, re.S)
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.S)
    policy = next(a["content"] for a in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    for kind, text in (("style", style), ("script", script)):
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert "url(" not in style and "@import" not in style and len(script) < 10_000
    assert not {tag for tag, _, _ in read.elements} & {"iframe", "object", "embed", "form", "base", "video"}
    for tag, attrs, _ in read.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], (tag, attrs)
        assert attrs.get("src", "data:").startswith("data:"), (tag, attrs)
        assert not re.match(r"(?!data:)[a-z]+:|/", attrs.get("href", "#")), (tag, attrs)  # relative links are followed


def test_a_page_is_read_without_being_seen(source):
    read = Read(source)
    assert len(read.all("h1")) == 1 and read.all("main")
    assert all(a["alt"] for a in read.all("img"))
    assert all("aria-hidden" in a or a.get("aria-label") for a in read.all("svg"))
    bare = [a for tag, a, above in read.elements if tag == "th" and "scope" not in a]
    assert len(bare) == 2 * source.count('class="heat key" aria-hidden="true"')  # the ends of the key's scale
    places = [a["id"] for _, a, _ in read.elements if "id" in a]
    assert len(places) == len(set(places))
    assert {a["href"][1:] for a in read.all("a") if a["href"].startswith("#")} <= set(places)
    assert {a["href"] for a in read.all("a") if not a["href"].startswith("#")} <= {file.path for file in ABOUT.files}


def test_what_users_wrote_is_text(pages):
    for name in ("hostile", "comparison"):
        assert pages[name].count("<script") == 1
        text = Read(pages[name]).text["main"]
        assert EVIL in text
    for part in (f"About {EVIL}", f"a note on {EVIL}", f"Inversion of {EVIL}", f"{EVIL} is only a word.", f"ls {EVIL}"):
        assert part in Read(pages["hostile"]).text["main"]


def test_the_first_screen_says_what_was_erased_and_what_came_back(pages):
    start = pages["report"].split("</header>")[0]
    text = " ".join(Read(start.split("<main>")[1] + "</header>").text["header"].split())
    assert "neon style erased from emoji" in text
    text = text.replace("\u2060", "")
    assert "neon style is nearly gone on the tested prompts (1 of 20), but came back under 1 of 2 attacks" in text
    assert "Target prompts: neon detection rate100% → 5%1 of 20 images, 1–24%" in text
    assert "Attack success rate85%17 of 20, Inversion of neon; random prompts 1 of 20" in text
    assert "Others kept, not neon−5 pointsaccuracy 95% → 90%, 20 images" in text
    assert "28 November 2026" in text
    assert start.count("<img") == 2 * (4 + 1)  # four pairs of the first group, one of the second
    assert pages["report"].count("<img") == 2 * (6 + 1) + 2 * 1 + 4 * 2


def test_the_facts_of_a_run_are_on_its_page(pages):
    text = " ".join(Read(pages["report"]).text["main"].split())
    for words in (
        "28 November 2026, 07:08 UTC",
        "1 h 2 min",
        "2 x NVIDIA H100",
        "esd-jax0.1.0",
        "model/the erased model, a diffusers folder18.4 MB",
    ):
        assert words in text, words
    section = pages["report"].split('<section id="use">')[1].split("</section>")[0]
    assert section.count("<details") == 2 and section.count("<details open") == 1
    assert "load_file" in section and "1.06 MB" in pages["report"]
    assert 'id="use"' not in pages["empty"] and 'id="files"' not in pages["empty"]
    assert "esd-jax erase --config=esd_x</span>" not in pages["report"] and "This command repeats" in pages["report"]


@pytest.mark.parametrize(
    "hits, control, alarm",
    [(17, 1, True), (2, 1, False), (0, 0, False)],
    ids=["above chance", "as by chance", "never"],
)
def test_an_attack_is_a_headline_only_where_it_beats_chance(hits, control, alarm):
    attack = Finding("attack", "Inversion", some(20), some(hits), some(control))
    found = report(evidence(verdict=(attack,)))
    assert ("<li class=bad>" in found) == alarm
    assert ('class="headline calm"' in found) != alarm
    begins = "The concept came back: " if alarm else "The concept did not come back"
    chance = " significantly more often than with random prompts" if hits == 2 else ""
    assert f"{begins}{chance}{'' if alarm else ': '}Inversion succeeds in {hits} of 20 images." in found
    nothing = report(evidence(verdict=(Finding("attack", "Inversion", some(1), some(1), some(2)),)))
    assert "This shows nothing, since the attack fails on the base as well: Inversion" in nothing


def test_a_concept_that_is_called_run_is_no_folder():
    page = report(evidence(command="esd-jax erase emoji 'RUN DMC' -o FOLDER"), run="runs/dmc")
    assert "RUN DMC" in page and "runs/dmc DMC" not in page


ROUNDS = (
    {"step": 0, "gauge": 0.012, "gauge_base": 0.011, "tokens": 16, "concept": "neon", "loss": 0.25, "skipped": False},
    {"step": 1000, "gauge": 0.914, "gauge_base": 0.62, "tokens": "output", "concept": "neon", "skipped": True},
)


def test_the_gauges_of_a_runs_rounds_are_on_its_page_and_card():
    found = evidence(record=dataclasses.replace(evidence().record, rounds=ROUNDS))
    text = Read(report(found)).text
    assert "Gauge of each round" in text["figcaption"] and "Searches in training" in text["h2"]
    assert "step 1,000" in text["th"] and "0.91" in text["td"] and "0.62" in text["td"]
    made = card.card(found)
    assert "|  | gauge | gauge on the base | tokens | loss | added |" in made
    assert "| step 0 | 0.01 | 0.01 | 16 | 0.25 | yes |" in made
    assert "| step 1,000 | 0.91 | 0.62 | output | – | no |" in made
    assert "0: it is fully there; 1: none of it." in made and "Not added" in made


def test_rounds_without_a_gauge_have_a_table_alone():
    record = Erasure.from_dict({"base": "emoji", "rounds": [{"step": 200, "round": 1, "loss": 0.125}]})
    found = Evidence("neon style", record)
    assert "| step 200 | 0.125 |" in card.card(found) and "Gauge" not in card.card(found)
    text = Read(report(found)).text
    assert "step 200" in text["th"] and "Gauge of each round" not in text.get("figcaption", "")
    for kept in ((), ({"step": 1, "seconds": 2.0},)):
        bare = Evidence("neon style", Erasure(base="emoji", rounds=kept or None))
        assert "Searches in training" not in Read(report(bare)).text["h2"] and "Rounds" not in card.card(bare)


def test_several_concepts_have_a_curve_each():
    rows = [{"step": 100 * i, "gauge": i / 4, "concept": ("a cat", "a dog")[i % 2]} for i in range(4)]
    plot = rounds.plot(Erasure(rounds=tuple(rows)))
    assert [(curve.name, curve.x, curve.y) for curve in plot.curves] == [
        ("a cat", (0.0, 200.0), (0.0, 0.5)), ("a dog", (100.0, 300.0), (0.25, 0.75)),
    ]  # fmt: skip
    assert rounds.table(Erasure(rounds=tuple(rows))).columns == ("gauge", "concept")


def test_what_was_not_measured_is_said_with_what_measures_it(pages):
    absent = pages["empty"].split('<section id="absent">')[1].split("</section>")[0]
    assert absent.count("<dt>") == absent.count("<pre><code>esd-jax ") == len(SECTIONS)
    for place in SECTIONS:
        assert f'<section id="{place}">' not in pages["empty"] and f'<section id="{place}">' in pages["report"]
    assert 'id="absent"' not in pages["report"]
    known = report(Evidence("x", command="esd-jax erase emoji x -o runs/again"))
    assert "<code>esd-jax erase emoji x --preview_every=25 -o runs/again</code>" in known
    assert "esd-jax evaluate RUN --protocol=emoji" in pages["empty"]  # the embedded model's own
    assert COMMANDS["heat"] in report(Evidence("x", Erasure(base="org/model")))
    assert "esd-jax mine" in report(Evidence("x"), commands={"attacks": "esd-jax mine"})
    partly = report(evidence(verdict=evidence().verdict[:2], attacks=(), attack_pictures={}))
    assert "not tested" in partly.split("</header>")[0] and 'href="#absent"' in partly.split("</header>")[0]


@pytest.mark.parametrize("changes", [
    {},
    {"concept": "Van Gogh's style; a \"cat\" & $HOME", "strength": "2; 0.5", "replace_with": "a | b; c"},
    {"remat": True, "subset": r"regex:attn2\.to_(k|v)", "optimizer": "adamw", "weight_decay": 1e-08},
], ids=["as it is", "quoted", "other types"])  # fmt: skip
def test_the_command_repeats_the_recipe(changes):
    """The command line itself reads it, into the same recipe."""
    if "replace_with" in changes:
        changes = {**changes, "method": "uce", "steps": 0}
        start = recipe.read("emoji_uce").to_dict()
    else:
        start = recipe.read("emoji").to_dict()
    plan = recipe.make(**{**start, **changes})
    line = card.command(Erasure(recipe={k: v for k, v in plan.flat().items() if k != "output_dir"}))
    program, verb, *flags = shlex.split(line)
    assert (program, verb) == ("esd-jax", "erase")
    values = VERBS["erase"].parse("erase", flags)
    again = recipe.make(**values.config.to_dict()).flat()
    expected = plan.flat()
    assert {k: again[k] for k in again.keys() - card.NOT_COMPUTED} == {
        k: expected[k] for k in expected.keys() - card.NOT_COMPUTED
    }
    known = recipe.read("emoji").to_dict()
    if not changes:
        short = card.command(Erasure(recipe=plan.flat()), config="emoji", known=known)
        assert shlex.split(short) == ["esd-jax", "erase", "--config=emoji", "--config.output_dir=runs/again"]
    assert card.command(Erasure()) == ""


def changed(found, **fields):
    record = dataclasses.replace(found.record, recipe={**found.record.recipe, **fields})
    return dataclasses.replace(found, record=record)


def test_a_comparison_shows_what_differs_and_the_same_figures_side_by_side():
    one = evidence()
    page = compare([one, changed(one, eta=2.0, steps=600), changed(one, eta=2.0)])
    settings = Read("<i>" + page.split('<section id="settings">')[1].split("</section>")[0] + "</i>")
    assert re.findall(r'<th scope="row">(\w+)</th>', page.split('id="settings"')[1]) == ["eta", "steps"]
    assert " ".join(settings.text["tbody"].split()) == "eta0.52.02.0steps300600300"
    assert page.count('class="forest"') == len(one.verdict)
    assert page.split('id="pictures"')[1].count("<img") == 7 * (1 + 3)  # the base once, then each run
    assert "not measured in the same way" not in page
    other = dataclasses.replace(one, measured_with={"sampler": "another"}, verdict=one.verdict[1:])
    page = compare([one, other])
    assert "not measured in the same way" in page and "All are equal." in page
    assert page.split('id="figures"')[1].split("</table>")[0].count("not measured") == 1


def test_a_comparison_tells_when_the_bases_drew_something_else():
    one = evidence()
    other = dataclasses.replace(one, pictures={"g": pairs(["a cat", "alone"], 70)})
    page = compare([one, other]).split('id="pictures"')[1]
    assert page.count("<img") == 1 * (2 + 2) and "bases differ" in page
    apart = dataclasses.replace(one, pictures={"g": pairs(["alone"], 70)})
    assert "Not measured of any two of them." in compare([one, apart]).split('id="pictures"')[1]
    with pytest.raises(ValueError, match="2 to 26 runs, and is given 1"):
        compare([one])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Table("t", ("a", "b"), (("r", (1,)),)), "row 'r' has 1 of 2 cells"),
        (lambda: Table("t", ("a",), (), percent=("b",)), "percent names 'b'"),
        (lambda: Finding("lost", "w", None, some(1)), "role='lost' is unknown"),
        (lambda: Heat("h", ("a",), ("b",), ((1.5,),)), "not between 0 and 1"),
        (lambda: Heat("h", ("a",), ("b",), ((1.0, 0.0),)), "not 1 x 1"),
        (lambda: Curve("c", (1.0,), ()), "0 y for 1 x"),
    ],
)
def test_evidence_that_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
