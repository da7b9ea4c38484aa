"""Figures of the report: their digits, curves, bars, maps and pictures."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from report_pages import evidence, pairs, picture, some, tensors

from esd_jax.erasure import Erasure
from esd_jax.evaluation.evidence import Curve, Evidence, Heat, Moment, Pair, Plot
from esd_jax.evaluation.report import charts, heatmap, layers, numbers, pictures, timeline
from esd_jax.evaluation.report.html import report
from esd_jax.evaluation.report.pictures import Encoder
from esd_jax.metrics.intervals import Estimate


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
    pair = Heat("t", ("base", "erased"), ("cat", "dog", "fox"), ((1.0, 1.0, 0.9), (0.0, 0.8, 0.95)), ("cat",))
    assert re.findall(r'<td class="change( fell)?"><span>([^<]+)<', heatmap.table(pair)) == [
        ("", "−100"), (" fell", "−20"), ("", "+5"),
    ]  # fmt: skip
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


def test_networks_with_other_blocks_are_gathered_by_them():
    """As in transformers, which have no down, mid and up blocks."""
    parts = ("attn.to_q.weight", "attn.to_out.0.weight", "ff.net.2.bias")
    names = [f"blocks.{i}.{part}" for i in (0, 1, 10, 2) for part in parts]
    names += ["single_transformer_blocks.0.proj_mlp.weight", "x_embedder.proj.weight", "proj_out.weight"]
    for component in ("", "transformer/"):
        groups, several = layers.by_block({f"{component}{name}": i / 100 for i, name in enumerate(names)})
        assert list(groups) == [*(f"blocks {i}" for i in (0, 1, 2, 10)), "single transformer blocks 0", "in and out"]
        assert [bar.label for bar in groups["blocks 0"]] == ["attn to_q", "attn to_out", "ff net 2 bias"]
        assert [bar.mean for bar in groups["blocks 10"]] == [0.06, 0.07, 0.08] and not several
        assert [bar.label for bar in groups["in and out"]] == ["proj_out", "x_embedder proj"]
    deep = {f"transformer/blocks.{i}.{part}": 0.1 for i in range(30) for part in parts}
    groups, several = layers.by_block(deep)
    assert len(groups) == 30 and {bar.count for group in groups.values() for bar in group} == {3} and several


def test_networks_without_blocks_are_gathered_by_the_first_part_of_their_names():
    names = ("unet/enter.weight", "unet/attn2.to_q.weight", "unet/attn2.to_k.weight", "unet/ff.inner.bias")
    groups, several = layers.by_block(dict.fromkeys(names, 0.5))
    assert {block: [bar.label for bar in bars] for block, bars in groups.items()} == {
        "attn2": ["to_q", "to_k"], "ff": ["inner bias"], "in and out": ["enter"],
    }  # fmt: skip
    assert not several
    ends = layers.by_block({"unet/conv_in.weight": 0.5, "unet/mid_block.resnets.1.conv1.weight": 0.5})[0]
    assert list(ends) == ["mid", "in and out"] and ends["in and out"][0].label == "conv_in"
    html = report(Evidence("x", Erasure(), weights=dict.fromkeys(names, 0.5)))
    assert "attn2" in html and "to_k" in html


def shown(tag):
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]+)"', tag).groups()
    assert kind == "webp"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_small_images_are_shown_without_loss_and_large_ones_nearly():
    small, large = picture(1), picture(1, 600)
    encoder = Encoder([small, large])
    assert np.array_equal(shown(encoder.tag(small, "x")), small)
    tag = encoder.tag(large, "<x>")
    assert 'width="512" height="512" alt="&lt;x&gt;"' in tag
    expected = np.asarray(Image.fromarray(large).resize((512, 512), Image.Resampling.LANCZOS), float)
    assert np.sqrt(np.mean((shown(tag) - expected) ** 2)) < 6
    assert "quality 84, reduced to 512 pixels" in encoder.note and "without loss" in Encoder([small]).note


def test_images_are_as_large_as_they_fit_together():
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (256, 256, 3), np.uint8) for _ in range(6)]
    sizes = []
    for budget in (2_000_000, 300_000, 60_000):
        encoder = Encoder(noise, budget)
        tags = [encoder.tag(pixels, "") for pixels in noise]
        assert sum(map(len, tags)) < budget + 100 * len(tags)
        sizes.append(shown(tags[0]).shape[0])
    assert sizes[0] == 256 and sizes[0] > sizes[1] > sizes[2]
    small = Encoder([pixels[:64, :64] for pixels in noise], 30_000)
    assert "quality" in small.note and shown(small.tag(noise[0][:64, :64], "")).shape[:2] == (64, 64)


@pytest.mark.parametrize("size, count", [(64, 30), (64, 300), (512, 40)])
def test_a_report_stays_below_a_megabyte(size, count):
    made = report(evidence(size=size, pictures={"g": pairs([f"prompt {i}" for i in range(count)], 0, size)}))
    assert made.count("<img") >= 2 * count
    assert len(made.encode()) < 1e6


def test_pairs_that_changed_are_told_from_those_that_did_not():
    one, other = picture(1), picture(2)
    drawn = pictures.group("g", [Pair("a", one, one), Pair("b", one, other)], Encoder([one, other]))
    equal, changed = re.findall(r'class="pair( same)?" data-ssim="([\d.-]+)"', drawn)
    assert equal == (" same", "1.00") and not changed[0] and float(changed[1]) < 0.95
    tiny = pictures.group("g", [Pair("a", one[:4, :4], one[:4, :4])], Encoder([one]))
    assert 'data-ssim="1.00"' in tiny


def test_a_timeline_has_a_row_for_each_prompt_and_curves_of_targets_and_others_apart():
    strip = np.stack([picture(1), picture(2), picture(3)])
    other = np.stack([picture(9), picture(2), picture(3)])
    moments = (
        Moment(0, strip, detected=(True, False, False)),
        Moment(225, other, detected=(True, False, False)),
        Moment(450, other, detected=(False, False, False)),
    )
    found = evidence(timeline=moments, timeline_prompts=("a cat in neon style", "a cat", "a dog"))
    drawn = timeline.section(found, Encoder(strip))
    assert re.findall(r'<th scope="row">([^<]+)<span class="under">(\w+ prompt)<', drawn) == [
        ("a cat in neon style", "target prompt"), ("a cat", "other prompt"), ("a dog", "other prompt"),
    ]  # fmt: skip
    assert drawn.count("class=hit") == 2 and "step 225: a cat in neon style, concept detected" in drawn
    labels = re.findall(r'aria-label="([^"]+)"', drawn)
    assert labels[1] == (
        "Detection rate of the concept. share of images against step. target prompts: 1 at 0, 0 at 450; "
        "other prompts: 0 at 0, 0 at 450."
    )
    similarity = re.search(r"target prompts: 1 at 0, (\S+) at 450; other prompts: 1 at 0, 1 at 450", labels[2])
    assert similarity and float(similarity[1]) < 0.9
    unnamed = timeline.section(evidence(timeline_prompts=(), title="neon style"), Encoder(strip))
    assert "all prompts" in unnamed and ">prompt 1<" in unnamed


def test_an_axis_ends_at_the_last_step():
    curve = Curve("loss", (4.5, 225.0, 445.5), (1.0, 0.5, 0.25))
    drawn = charts.lines(Plot("p", "step", "loss", (curve,)), x_end=450)
    ticks = re.findall(r'y="254.0" text-anchor="middle">([^<]+)<', drawn)
    assert ticks == ["0", "100", "200", "300", "400", "450"]
    (points,) = re.findall(r'polyline class="line s0" points="([^"]+)"', drawn)
    assert float(points.split()[-1].split(",")[0]) < charts.WIDTH - 14
    assert charts._ticks_to((0.0, 60.0)) == [0, 20, 40, 60] and charts._ticks_to((0.0, 410.0))[-2:] == [300, 410]


def test_names_of_curves_do_not_lie_on_the_axis():
    curves = tuple(Curve(name, (0.0, 1.0), (1.0, 0.0)) for name in ("one", "two", "three"))
    drawn = charts.lines(Plot("p", "x", "y", curves))
    places = [float(y) for y in re.findall(r'class="curve s\d" x="[\d.]+" y="([\d.]+)"', drawn)]
    assert max(places) <= charts.HEIGHT - charts.BOTTOM + 4
    assert [b - a for a, b in zip(places, places[1:], strict=False)] == [14, 14]
