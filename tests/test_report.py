"""The report, the comparison and the card: what they say, that they say it safely, and that a browser shows them."""

import base64
import dataclasses
import hashlib
import io
import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from browser import CHROMIUM, Browser
from PIL import Image

from esd_jax import recipe
from esd_jax.cli import VERBS
from esd_jax.erasure import Erasure
from esd_jax.evaluation.evidence import Curve, Evidence, Finding, Heat, Moment, Pair, Plot, Table
from esd_jax.evaluation.report import card, charts, heatmap, layers, numbers, page
from esd_jax.evaluation.report.comparison import compare
from esd_jax.evaluation.report.html import COMMANDS, report
from esd_jax.metrics.intervals import Estimate, rate

EVIL = "<script>alert('x')</script>\"&|*_`"
VOID = {"meta", "link", "img", "br", "input", "hr"}
SECTIONS = ("measured", "interference", "attacks", "timeline", "front", "weights", "training", "method")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is found")


def some(hits, n=20):
    return rate([True] * hits + [False] * (n - hits))


def picture(seed, size=64):
    """Smooth, as drawings are; noise would say nothing of file sizes."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def pairs(prompts, seed, size=64):
    return tuple(Pair(p, picture(seed + i, size), picture(seed + 100 + i, size)) for i, p in enumerate(prompts))


def evidence(word="neon", size=64, **changes):
    """Of everything something; `word` is wherever a user's text may be."""
    made = recipe.make(**{**recipe.read("emoji").to_dict(), "concept": f"{word} style", "preview_prompts": word})
    record = {
        "concepts": [{"text": f"{word} style", "from_": None, "strength": 1.0}],
        "base": f"emoji {word}" if word == EVIL else "emoji",
        "base_sha256": "ab" * 32,
        "recipe": {k: v for k, v in made.flat().items() if k != "output_dir"},
        "versions": {"esd-jax": "0.1.0", word: "1"},
        "license": "apache-2.0",
        "step": 300,
    }
    attack = ("once", "any of 5", "random prompts")
    found = Evidence(
        f"{word} style",
        Erasure.from_dict(record),
        measured_with={"sampler": word, "detectors": [{"name": word, "sha256": "cd" * 32}], word: {"seed": 1}},
        verdict=(
            Finding("erased", f"{word} seen", some(20), some(1)),
            Finding("kept", f"others kept, not {word}", some(19), some(18), some(17)),
            Finding("kept", f"likeness to {word}", None, Estimate(0.93, 0.91, 0.96, 20), percent=False),
            Finding("attack", f"Inversion of {word}", some(20), some(17), some(1)),
            Finding("attack", "a weaker one", some(20), some(2), some(1)),
        ),
        pictures={word: pairs([word, "a cat", "b", "c", "d", "e"], 0, size), "kept": pairs(["a dog"], 20, size)},
        tables=(
            Table(
                f"About {word}",
                ("n", f"{word} seen", "SSIM", "remark"),
                (
                    (f"prompts of {word}", ()),
                    ("base", (20, some(20), None, word)),
                    ("erased", (20, some(1), Estimate(0.13, 0.07, 0.19, 20), "")),
                ),
                f"a note on {word}",
                (f"{word} seen",),
            ),
        ),
        attacks=(Table(word, attack, (("Inversion", (some(17), some(19), some(1))),), percent=attack),),
        attack_pictures={word: pairs([word], 40, size)},
        timeline=tuple(
            Moment(100 * i, np.stack([picture(60 + i, size)] * 2), 1 - i / 3, 1 - i / 4) for i in range(4)
        ),
        timeline_prompts=(word, "a cat"),
        heat=Heat(word, ("base", word), ("ink", "pixel", word), ((1.0, 0.5, 1.0), (0.9, None, 0.05)), (word,)),
        front=Plot(word, word, f"not {word}", (
            Curve(word, (1.0, 0.2), (1.0, 0.9), (word, "1"), y_low=(0.8, 0.7), y_high=(1.0, 1.0)),
        ), percent=True),
        weights={f"unet/{name}": 0.01 * (i + 1) for i, name in enumerate(tensors(2))} | {word: 0.4},
        training=Plot(word, "update", "loss", (
            Curve(word, (1.0, 2.0), (0.5, 0.25)), Curve("b", (1.0, 2.0), (1.0, 2.0)),
        )),
        caveats=(f"{word} is only a word.",),
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def tensors(depth, parts=("attn2.to_q.weight", "attn2.to_k.weight", "attn2.to_v.weight", "attn2.to_out.0.weight")):
    blocks = [f"{way}_blocks.{i}" for way in ("down", "up") for i in range(depth)]
    return [f"{b}.attentions.{a}.transformer_blocks.0.{p}" for b in blocks for a in range(2) for p in parts]


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


PAGES = {
    "report": lambda: report(evidence()),
    "empty": lambda: report(Evidence("neon style", Erasure(base="emoji"))),
    "hostile": lambda: report(evidence(EVIL)),
    "comparison": lambda: compare([evidence(), evidence(EVIL)]),
}


@pytest.fixture(scope="module")
def pages():
    return {name: make() for name, make in PAGES.items()}


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
    found = report(evidence(verdict=(attack,)))
    assert ('<li class="back">' in found) == alarm
    assert ('class="headline calm"' in found) != alarm
    assert f"came back in {'none of 20' if hits == 0 else f'{hits} of 20'} images under Inversion." in found


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


def test_figures_have_the_digits_that_their_number_gives_meaning():
    cells = [(some(1), True), (some(1999, 2000), True), (some(0), True), (Estimate(0.1285, 0.068, 0.189, 20), False)]
    assert [numbers.with_interval(*cell) for cell in cells] == [
        "5% (1–24%)", "99.95% (99.7–99.99%)", "0% (0–16%)", "0.13 (0.07–0.19)",
    ]  # fmt: skip
    assert numbers.with_interval(Estimate(14.2, 13.9, 14.5, 30000)) == "14.2 (13.9–14.5)"
    assert numbers.interval(Estimate(0.05, -0.1, 0.2, 9)) == "-0.10 to 0.20"
    assert [numbers.value(v) for v in (None, "words", 1234, 0.00479, 0.5)] == ["–", "words", "1,234", "0.00479", "0.5"]
    assert [numbers.share(x) for x in (0, 1, 1e-9, 1 - 1e-9, 1.2)] == ["0%", "100%", "<0.001%", ">99.999%", "120%"]


def test_curves_lie_where_their_axes_say():
    """The y of a share of a half is the middle between the lines of 0% and 100%."""
    plot = Plot(
        "p", "x", "y", (Curve("c", (0.0, 0.5), (0.5, 1.0), ("a", "b"), y_low=(0.25, 0.9), y_high=(0.75, 1.0)),), True
    )
    drawn = charts.lines(plot)
    grid = [float(y) for y in re.findall(r'class="grid"[^>]* y1="([\d.]+)"', drawn)]
    (points,) = re.findall(r'polyline class="line s0" points="([^"]+)"', drawn)
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in points.split())
    assert y0 == pytest.approx((grid[0] + grid[-1]) / 2, abs=0.2) and y1 == pytest.approx(grid[-1], abs=0.2)
    assert (x0, x1) == (charts.LEFT, pytest.approx((charts.LEFT + charts.WIDTH - 14) / 2, abs=0.2))
    low, high = map(float, re.search(r'class="error s0"[^>]* y1="([\d.]+)" y2="([\d.]+)"', drawn).groups())
    assert low - high == pytest.approx((grid[0] - grid[-1]) / 2, abs=0.2)
    assert "0%" in drawn and "100%" in drawn and ">a</text>" in drawn


def test_a_plot_begins_at_zero_and_drops_what_is_no_number():
    drawn = charts.lines(Plot("p", "x", "y", (Curve("c", (1.0, 2.0, 3.0), (5.0, float("nan"), 6.0)),)))
    assert re.findall(r'text-anchor="end">([^<]+)<', drawn)[0] == "0"
    assert drawn.count("<circle") == 2
    with pytest.raises(ValueError, match="'p' has no points"):
        charts.lines(Plot("p", "x", "y", (Curve("c", (1.0,), (float("nan"),)),)))


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, 0.00831), (-3.0, 7.0), (0.0, 30_000.0), (0.0, 0.0), (2.0, 2.0)])
def test_ticks_enclose_what_is_drawn(bounds):
    ticks = charts._ticks(bounds)
    assert ticks[0] <= bounds[0] and ticks[-1] >= bounds[1] and 3 <= len(ticks) <= 9
    words = [charts._tick(tick, ticks) for tick in ticks]
    assert len(set(words)) == len(words)


def test_many_points_are_smoothed_and_the_raw_ones_stay():
    curve = Curve("loss", tuple(map(float, range(200))), tuple(float(i % 2) for i in range(200)))
    drawn = charts.lines(Plot("p", "x", "y", (curve,)))
    faint, mean = re.findall(r'polyline class="line ?(?:faint)? s0" points="([^"]+)"', drawn)
    heights = [[float(p.split(",")[1]) for p in line.split()] for line in (faint, mean)]
    assert len(heights[0]) == len(heights[1]) == 200
    assert np.ptp(heights[1][20:-20]) < 0.1 * np.ptp(heights[0])
    assert "mean of 25 neighbouring points" in drawn


def test_dots_and_whiskers_lie_on_one_scale():
    mark = charts.Mark("m", {"before": some(20), "after": some(0), "control": None})
    drawn = charts.forest([mark], {"before": "before", "after": "after", "control": "chance"})
    at = {kind: float(x) for kind, x in re.findall(r'circle class="(\w+)" cx="([\d.]+)%"', drawn)}
    assert at == {"before": 97.0, "after": 3.0}
    low, high = map(float, re.search(r'whisker before" x1="([\d.]+)%" x2="([\d.]+)%"', drawn).groups())
    assert high == 97 and low == pytest.approx(3 + 94 * some(20).low, abs=0.01)


def test_a_heat_map_says_its_shares_and_turns_when_it_is_wide():
    heat = evidence().heat
    drawn = heatmap.table(heat)
    assert re.findall(r'<td class="(h\d+)[^"]*"><span>(\d+)<', drawn)[:3] == [
        ("h20", "100"),
        ("h10", "50"),
        ("h20", "100"),
    ]
    assert drawn.count("class=target") == 1 and drawn.count('class="none"') == 1
    names = tuple(f"thing {i}" for i in range(40))
    wide = Heat("t", ("base", "erased"), names, ((0.5,) * 40, (0.25,) * 40), ("thing 7",))
    drawn = heatmap.table(wide)
    assert drawn.count("<table") == 3 + 1 and drawn.count('scope="row"') == 40  # three columns, and the key
    assert '<th scope="row" class=target><span>thing 7</span>' in drawn


def test_tensors_are_gathered_by_block():
    names = tensors(3, ("attn2.to_q.weight", "attn2.to_out.0.weight", "attn2.to_out.0.bias"))
    names += ["mid_block.resnets.1.conv1.weight", "conv_in.bias", "up_blocks.0.upsamplers.0.conv.weight"]
    groups, several = layers.by_block({f"unet/{name}": i / 100 for i, name in enumerate(names)})
    assert list(groups) == ["down 0", "down 1", "down 2", "mid", "up 0", "up 1", "up 2", "in and out"]
    assert [bar.label for bar in groups["down 0"]] == [
        f"attention {a} attn2 {part}" for a in (0, 1) for part in ("to_q", "to_out", "to_out bias")
    ]
    assert groups["mid"][0].label == "resnet 1 conv1" and not several
    assert {bar.label for bar in groups["up 0"]} > {"upsampler 0 conv"}


@pytest.mark.parametrize("depth, parts", [(4, 5), (4, 40), (30, 20)])
def test_hundreds_of_tensors_become_few_bars_of_which_none_is_lost(depth, parts):
    kinds = ("attn1.to_q", "attn2.to_k", "ff.net.2", "norm1", "proj")
    names = tensors(depth, tuple(f"{kinds[i % 5]}{i}.weight" for i in range(parts)))
    weights = {f"unet/{name}": 0.001 * (i + 1) for i, name in enumerate(names)}
    groups, several = layers.by_block(weights)
    bars = [bar for group in groups.values() for bar in group]
    assert several and sum(bar.count for bar in bars) == len(names)
    assert len(bars) <= max(layers.MOST, 2 * depth)
    assert sum(bar.mean * bar.count for bar in bars) == pytest.approx(sum(weights.values()))
    assert (min(bar.low for bar in bars), max(bar.high for bar in bars)) == (0.001, pytest.approx(0.001 * len(names)))


def test_text_encoders_and_other_networks_have_a_place_too():
    assert layers.place("text_encoder/text_model.encoder.layers.3.self_attn.q_proj.weight") == (
        "text encoder", "layer 3", "self_attn q_proj",
    )  # fmt: skip
    assert layers.place("vae/decoder.conv_in.bias") == ("vae", "", "decoder conv_in bias")
    second = "unet/down_blocks.1.attentions.0.transformer_blocks.4.attn1.to_q.weight"
    assert layers.place(second).layer != layers.place(second.replace("blocks.4", "blocks.5")).layer


def shown(tag):
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]+)"', tag).groups()
    return kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_small_images_are_shown_without_loss_and_large_ones_nearly():
    small, large = picture(1), picture(1, 512)
    kind, read = shown(page.image(small, "x"))
    assert kind == "png" and np.array_equal(read, small)
    kind, read = shown(page.image(large, "x"))
    assert kind == "webp" and read.shape == (384, 384, 3)
    expected = np.asarray(Image.fromarray(large).resize((384, 384), Image.Resampling.LANCZOS), float)
    assert np.sqrt(np.mean((read - expected) ** 2)) < 6
    assert "without loss" in page.shown_as([small]) and "reduced to 384 pixels" in page.shown_as([small, large])


@pytest.mark.parametrize("size", [64, 512])
def test_a_report_of_sixty_pictures_stays_below_3_megabytes(size):
    made = report(evidence(size=size, pictures={"g": pairs([f"prompt {i}" for i in range(30)], 0, size)}))
    assert made.count("<img") >= 60
    assert len(made) < 3e6


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
    made = recipe.make(**{**start, **changes})
    line = card.command(Erasure(recipe={k: v for k, v in made.flat().items() if k != "output_dir"}))
    program, verb, *flags = shlex.split(line)
    assert (program, verb) == ("esd-jax", "erase")
    values = VERBS["erase"].parse("erase", flags)
    again = recipe.make(**values.config.to_dict()).flat()
    expected = made.flat()
    assert {k: again[k] for k in again.keys() - card.NOT_COMPUTED} == {
        k: expected[k] for k in expected.keys() - card.NOT_COMPUTED
    }
    known = recipe.read("emoji").to_dict()
    if not changes:
        short = card.command(Erasure(recipe=made.flat()), config="emoji", known=known)
        assert shlex.split(short) == ["esd-jax", "erase", "--config=emoji", "--config.output_dir=runs/again"]
    assert card.command(Erasure()) == ""


def test_the_card_is_markdown_that_hubs_read():
    made = card.card(evidence(), picture="before_after.png", report="report.html")
    _, front, body = made.split("---\n", 2)
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
    made = card.card(evidence(EVIL))
    outside = re.sub(r"```.*?```", "", made, flags=re.S)
    assert "<script" not in outside.replace(r"\<", "")
    rows = [line for line in outside.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6, 5}
    yaml.safe_load(made.split("---\n", 2)[1])


def test_the_facts_are_flat_texts():
    found = card.facts(evidence())
    assert all(isinstance(k, str) and isinstance(v, str) and k.startswith("esd_jax.") for k, v in found.items())
    assert found["esd_jax.erased"] == "neon style" and found["esd_jax.base_sha256"] == "ab" * 32
    assert found["esd_jax.finding.1"] == "erased: neon seen: 100% before, 5% (1–24%) after, n = 20"
    assert json.loads(found["esd_jax.measured_with"])["detectors"][0]["sha256"] == "cd" * 32
    assert found["esd_jax.attacked"] == "yes"
    little = card.facts(Evidence("x"))
    assert little == {"esd_jax.erased": "x", "esd_jax.measured": "no", "esd_jax.attacked": "no"}


def changed(found, **fields):
    record = dataclasses.replace(found.record, recipe={**found.record.recipe, **fields})
    return dataclasses.replace(found, record=record)


def test_a_comparison_shows_what_differs_and_the_same_figures_side_by_side():
    one = evidence()
    made = compare([one, changed(one, eta=2.0, steps=600), changed(one, eta=2.0)])
    settings = Read("<i>" + made.split('<section id="settings">')[1].split("</section>")[0] + "</i>")
    assert re.findall(r'<th scope="row">(\w+)</th>', made.split('id="settings"')[1]) == ["eta", "steps"]
    assert " ".join(settings.text["tbody"].split()) == "eta0.52.02.0steps300600300"
    assert made.count('class="forest"') == len(one.verdict)
    assert made.split('id="pictures"')[1].count("<img") == 7 * (1 + 3)  # the base once, then each run
    assert "not measured in the same way" not in made
    other = dataclasses.replace(one, measured_with={"sampler": "another"}, verdict=one.verdict[1:])
    made = compare([one, other])
    assert "not measured in the same way" in made and "All are equal." in made
    assert made.split('id="figures"')[1].split("</table>")[0].count("not measured") == 1


def test_a_comparison_tells_when_the_bases_drew_something_else():
    one = evidence()
    other = dataclasses.replace(one, pictures={"g": pairs(["a cat", "alone"], 70)})
    made = compare([one, other]).split('id="pictures"')[1]
    assert made.count("<img") == 1 * (2 + 2) and "bases differ" in made
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


@needs_browser
def test_a_browser_shows_every_page_and_asks_for_nothing(pages, tmp_path):
    with Browser() as browser:
        for name, source in pages.items():
            (tmp_path / f"{name}.html").write_text(source, encoding="utf-8")
        shots = {}
        for name, width, dark in [(n, w, False) for n in pages for w in (375, 800, 1280)] + [("report", 1280, True)]:
            browser.show(tmp_path / f"{name}.html", width=width, dark=dark)
            for size in ("125%", "100%"):  # fonts differ in width between machines: larger letters stand for wide ones
                browser.value(f"document.documentElement.style.fontSize = '{size}'")
                wider = browser.value("document.documentElement.scrollWidth") - width
                assert wider <= 0, f"{name} with letters of {size} is {wider} pixels wider than a window of {width}"
            assert browser.value("[...document.images].every(i => i.naturalWidth > 0)")
            browser.picture(tmp_path / "shot.png")
            shots[name, width, dark] = np.asarray(Image.open(tmp_path / "shot.png").convert("L"), float)
        assert browser.complaints == []
        assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
        assert {url for url in browser.requests if url.startswith("file")} == {
            (tmp_path / f"{name}.html").as_uri() for name in pages
        }
        light, dark = shots["report", 1280, False], shots["report", 1280, True]
        assert light[5, 5] > 200 and dark[5, 5] < 60
        assert light.std() > 20  # something is drawn
        # The pictures stand on the first screen.
        browser.show(tmp_path / "report.html")
        assert browser.value("document.images[0].getBoundingClientRect().bottom") < 800
        pdf = browser.ask("Page.printToPDF")["data"]
        assert base64.b64decode(pdf).startswith(b"%PDF")


@needs_browser
def test_the_browser_complains_of_a_page_that_asks_for_something(pages, tmp_path):
    """What the test above relies on."""
    asking = pages["empty"].replace("<main>", '<main><img src="https://example.invalid/x.png" style="width: 1px">')
    (tmp_path / "page.html").write_text(asking, encoding="utf-8")
    with Browser() as browser:
        browser.show(tmp_path / "page.html")
        assert any("Content Security Policy" in text for text in browser.complaints)
        assert any("invalid" in url for url in browser.requests)  # what was asked for is noted, though it was refused
