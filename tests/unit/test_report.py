"""The report, the comparison and the card: what they say, and that they say it safely."""

import base64
import dataclasses
import hashlib
import json
import re
import shlex
from html.parser import HTMLParser

import pytest
import yaml
from report_pages import EVIL, PAGES, all_pages, evidence, pairs, some

from esd_jax import recipe
from esd_jax.cli import VERBS
from esd_jax.erasure import Erasure
from esd_jax.evaluation.evidence import Curve, Evidence, Finding, Heat, Table
from esd_jax.evaluation.report import card
from esd_jax.evaluation.report.comparison import compare
from esd_jax.evaluation.report.html import COMMANDS, report

VOID = {"meta", "link", "img", "br", "input", "hr"}
SECTIONS = ("measured", "interference", "attacks", "timeline", "front", "weights", "training", "method")


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


def test_a_page_can_ask_for_nothing_and_runs_nothing(source):
    read = Read(source)
    (style,) = re.findall(r"<style>(.*?)</style>", source, re.S)
    policy = next(a["content"] for a in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in policy
    assert "url(" not in style and "@import" not in style
    assert not {tag for tag, _, _ in read.elements} & {"script", "iframe", "object", "embed", "form", "base", "video"}
    for tag, attrs, _ in read.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "style"], (tag, attrs)
        assert all(attrs.get(name, "data:").startswith(("data:", "#")) for name in ("src", "href")), (tag, attrs)


def test_a_page_is_read_without_being_seen(source):
    read = Read(source)
    assert len(read.all("h1")) == 1 and read.all("main")
    assert all(a["alt"] for a in read.all("img"))
    assert all("aria-hidden" in a or a.get("aria-label") for a in read.all("svg"))
    bare = [a for tag, a, above in read.elements if tag == "th" and "scope" not in a]
    assert len(bare) == 2 * source.count('class="heat key" aria-hidden="true"')  # the ends of the key's scale
    places = [a["id"] for _, a, _ in read.elements if "id" in a]
    assert len(places) == len(set(places))
    assert {a["href"][1:] for a in read.all("a")} <= set(places)


def test_what_users_wrote_is_text(pages):
    for name in ("hostile", "comparison"):
        assert "<script" not in pages[name]
        text = Read(pages[name]).text["main"]
        assert EVIL in text
    for part in (f"About {EVIL}", f"a note on {EVIL}", f"Inversion of {EVIL}", f"{EVIL} is only a word."):
        assert part in Read(pages["hostile"]).text["main"]


def test_the_first_screen_says_what_was_erased_and_what_came_back(pages):
    start = pages["report"].split("</header>")[0]
    text = " ".join(Read(start.split("<main>")[1] + "</header>").text["header"].split())
    assert "neon style erased from emoji" in text
    assert "100% → 5%neon seen 95% interval 1–24%, 20 images" in text
    assert "0.93likeness to neon 95% interval 0.91–0.96" in text
    assert "The concept came back in 17 of 20 images under Inversion of neon. Random prompts: 1 of 20." in text
    assert start.count("<img") == 2 * (4 + 1)  # four pairs of the first group, one of the second
    assert pages["report"].count("<img") == 2 * (6 + 1) + 2 * 1 + 4 * 2


@pytest.mark.parametrize(
    "hits, control, alarm",
    [(17, 1, True), (2, 1, False), (0, 0, False)],
    ids=["above chance", "as by chance", "never"],
)
def test_an_attack_is_a_headline_only_where_it_beats_chance(hits, control, alarm):
    attack = Finding("attack", "Inversion", some(20), some(hits), some(control))
    page = report(evidence(verdict=(attack,)))
    assert ('<li class="back">' in page) == alarm
    assert ('class="headline calm"' in page) != alarm
    assert f"came back in {'none of 20' if hits == 0 else f'{hits} of 20'} images under Inversion." in page


def test_what_was_not_measured_is_said_with_what_measures_it(pages):
    for place in SECTIONS:
        section = pages["empty"].split(f'<section id="{place}">')[1].split("</section>")[0]
        assert "Not measured" in section and "<code>esd-jax " in section
        assert "Not measured" not in pages["report"].split(f'<section id="{place}">')[1].split("</section>")[0]
    assert "esd-jax evaluate RUN --protocol=emoji" in pages["empty"]  # the embedded model's own
    assert COMMANDS["heat"] in report(Evidence("x", Erasure(base="org/model")))
    assert "esd-jax mine" in report(Evidence("x"), commands={"attacks": "esd-jax mine"})
    partly = evidence(verdict=evidence().verdict[:2], attacks=(), attack_pictures={})
    assert "Whether attacks bring it back" in report(partly).split("</header>")[0]


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


def test_the_card_is_markdown_that_hubs_read():
    text = card.card(evidence(), picture="before_after.png", report="report.html")
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert (front["base_model"], front["license"]) == ("emoji", "apache-2.0")
    assert {"text-to-image", "concept-erasure"} <= set(front["tags"])
    assert "neon seen: 100% before, 5% (1–24%) after, n = 20" in body
    assert "Inversion of neon: the concept came back in 17 of 20 images; by as many random prompts in 1 of 20" in body
    assert "| erased | 20 | 5% (1–24%) | 0.13 (0.07–0.19) |  |" in body
    assert "![Before and after, the same prompts and noise](<before_after.png>)" in body
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6, 5}
    assert "Nothing was measured." in card.card(Evidence("x", Erasure(base="/home/me/model")))
    assert "base_model" not in card.card(Evidence("x", Erasure(base="/home/me/model")))


def test_the_cards_text_is_no_markup():
    text = card.card(evidence(EVIL))
    outside = re.sub(r"```.*?```", "", text, flags=re.S)
    assert "<script" not in outside.replace(r"\<", "")
    rows = [line for line in outside.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6, 5}
    yaml.safe_load(text.split("---\n", 2)[1])


def test_the_facts_are_flat_texts():
    facts = card.facts(evidence())
    assert all(isinstance(k, str) and isinstance(v, str) and k.startswith("esd_jax.") for k, v in facts.items())
    assert facts["esd_jax.erased"] == "neon style" and facts["esd_jax.base_sha256"] == "ab" * 32
    assert facts["esd_jax.finding.1"] == "erased: neon seen: 100% before, 5% (1–24%) after, n = 20"
    assert json.loads(facts["esd_jax.measured_with"])["detectors"][0]["sha256"] == "cd" * 32
    assert facts["esd_jax.attacked"] == "yes"
    little = card.facts(Evidence("x"))
    assert little == {"esd_jax.erased": "x", "esd_jax.measured": "no", "esd_jax.attacked": "no"}


def changed(results, **fields):
    record = dataclasses.replace(results.record, recipe={**results.record.recipe, **fields})
    return dataclasses.replace(results, record=record)


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
