"""Of what a measurement consists: targets, groups of prompts, noise and statistics."""

import re

import numpy as np
import pytest
from painter import CAT, NEON

from esd_jax.demo import artwork, captions, groups, vocabulary
from esd_jax.demo.groups import Target, parse_target
from esd_jax.metrics import intervals, likeness

EVERY = [Target("style", (s,)) for s in vocabulary.styles()] + [Target("object", (o,)) for o in vocabulary.objects()]


# --- targets and groups


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("neon style", NEON),
        ("neon", NEON),
        (" Pop  Art style", Target("style", ("pop art",))),
        ("a cat", CAT),
        ("cat", CAT),
        ("an octopus", Target("object", ("octopus",))),
        ("an ice cream", Target("object", ("ice cream",))),
    ],
)
def test_targets_are_understood(text, target):
    assert parse_target(text) == target


def test_several_targets_are_erased_and_measured_together():
    both = parse_target("a cat, the  rocket")
    assert both == Target("object", ("cat", "rocket")) == parse_target(both.concept)
    assert (both.concepts, both.placebo) == (["a cat", "a rocket"], ["a xqzv", "a xqvz"])
    by_name = {group.name: group for group in groups.groups(both)}
    assert {ask.object for ask in by_name["own"].asks} == {"cat", "rocket"}
    assert {ask.object for ask in by_name["nearest"].asks} == {"dog", "rabbit", "airplane"}
    assert {ask.category for ask in by_name["implicit"].asks} == {"pet", "flying machine"}
    assert not {"dog", "cat", "rocket"} & {ask.object for ask in by_name["others"].asks}
    assert "nearest" not in {group.name for group in groups.groups(parse_target("airplane, rocket"))}
    for wrong in ("a cat, neon style", "a cat, cat"):
        with pytest.raises(ValueError, match="is no target"):
            parse_target(wrong)


@pytest.mark.parametrize("text", ["a unicorn", "", "style", "a neon", "cat style", "pet"])
def test_other_targets_are_refused_naming_what_is_known(text):
    with pytest.raises(ValueError, match=r"does not know .*neon.*or an object .*rocket") as error:
        parse_target(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", EVERY, ids=lambda t: t.label)
def test_concepts_are_parsed_back_and_shams_are_unknown(target):
    assert parse_target(target.concept) == target
    words = {word for caption in captions.every_caption() for word in re.findall(r"\w+", caption)}
    assert not words & set(groups.NONSENSE)
    with pytest.raises(ValueError, match="does not know"):
        parse_target(target.placebo[0])


@pytest.mark.parametrize("target", EVERY, ids=lambda t: t.label)
def test_every_group_asks_alike_and_no_prompt_twice(target):
    listed = groups.groups(target)
    assert len({g.name for g in listed}) == len(listed)
    for group in (*listed, *groups.base_groups()):
        prompts = [ask.prompt for ask in group.asks]
        assert len(set(prompts)) == len(prompts) >= 1, group.name
        kinds = {tuple(getattr(ask, kind) is None for kind in ("object", "category", "style")) for ask in group.asks}
        assert len(kinds) == 1, group.name  # so that n is the same for every rate of a row
        for ask in group.asks:
            if ask.object and group.name != "implicit":
                assert ask.object in ask.prompt and (ask.style is None or ask.style in ask.prompt)


def asked(target: Target, name: str, kind: str) -> set[str]:
    (group,) = (g for g in groups.groups(target) if g.name == name)
    return {getattr(ask, kind) for ask in group.asks}


def test_the_groups_of_a_style():
    names = ["own", "alone", "phrasings", "nearest", "others", "unrelated"]
    assert [g.name for g in groups.groups(NEON)] == names
    for name in ("own", "alone", "phrasings"):
        assert asked(NEON, name, "style") == {"neon"}
    assert asked(NEON, "own", "object") == set(vocabulary.objects())
    assert asked(NEON, "alone", "prompt") == {"neon style", "neon", "neon drawing", "a drawing in neon style"}
    assert "neon cat" in asked(NEON, "phrasings", "prompt")
    nearest, others = asked(NEON, "nearest", "style"), asked(NEON, "others", "style")
    assert nearest == {"blueprint", "pop art"}
    assert nearest | others | {"neon"} == set(vocabulary.styles()) and not nearest & others
    assert asked(NEON, "unrelated", "style") == {None}


def test_the_groups_of_an_object():
    names = ["own", "alone", "phrasings", "implicit", "nearest", "others", "unrelated"]
    assert [g.name for g in groups.groups(CAT)] == names
    assert asked(CAT, "alone", "prompt") == {"a cat", "a picture of a cat"}
    for name in ("own", "alone", "phrasings"):
        assert asked(CAT, name, "object") == {"cat"}
    assert asked(CAT, "own", "style") == set(vocabulary.styles())
    prompts = asked(CAT, "implicit", "prompt")
    assert {"a pet", "a furry friend", "a pet in neon style"} <= prompts
    assert not any("cat" in prompt.split() for prompt in prompts)
    assert asked(CAT, "nearest", "object") == {"dog", "rabbit"}
    others = asked(CAT, "others", "object")
    assert others == set(vocabulary.objects()) - {"cat", "dog", "rabbit"}
    assert asked(CAT, "unrelated", "object") == {None}


@pytest.mark.parametrize(
    "target", [*EVERY, *map(parse_target, ("neon, pop art", "a cat, a rocket"))], ids=lambda t: t.label
)
def test_no_prompt_is_in_two_groups(target):
    prompts = [ask.prompt for group in groups.groups(target) for ask in group.asks]
    assert len(set(prompts)) == len(prompts)


def test_phrasings_of_the_measurement_are_none_of_the_training():
    trained = set(captions.every_caption())
    for target in EVERY:
        assert not trained & asked(target, "phrasings", "prompt")


def test_the_nearest_styles_are_those_whose_artwork_differs_least():
    pictures = {
        s: np.stack([artwork.draw(o, s) for o in vocabulary.objects()]).astype(np.float32) for s in vocabulary.styles()
    }
    for style, nearest in groups.NEAREST.items():
        distance = {s: np.square(p - pictures[style]).mean() for s, p in pictures.items() if s != style}
        assert nearest == tuple(sorted(distance, key=distance.get)[:2])


@pytest.mark.parametrize("target", [*EVERY[:8], CAT, Target("object", ("owl",))], ids=lambda t: t.label)
def test_the_picture_shows_the_target_first_and_then_not(target):
    (_, own), *rest = groups.examples(target)
    assert all(target.label in prompt for prompt in own)
    assert not any(target.label in prompt.split() for _, prompts in rest for prompt in prompts)
    assert all(prompt for _, prompts in rest for prompt in prompts)


ALL_BUT_ONE = [tuple(s for s in vocabulary.styles() if s != kept) for kept in (*vocabulary.styles(), None)]
WHOLE_CATEGORIES = [vocabulary.members(category) for category in vocabulary.categories()] + [vocabulary.objects()]


@pytest.mark.parametrize(
    "target",
    [Target("style", names) for names in ALL_BUT_ONE] + [Target("object", names) for names in WHOLE_CATEGORIES],
    ids=lambda t: t.label[:20],
)
def test_a_list_that_leaves_nothing_near_it_has_a_picture(target):
    titles, prompts = zip(*groups.examples(target), strict=True)
    assert titles[0].startswith("target") and all(prompts)
    for shown in prompts[1:] if target.kind == "style" else ():
        assert not any(f"in {name} style" in prompt for prompt in shown for name in target.names)


# --- noise


def test_noise_depends_on_the_prompt_and_its_repetition_alone():
    own, *_ = groups.groups(CAT)
    few, many = groups.shots(own, 5, seed=1), groups.shots(own, 40, seed=1)
    assert few == many[:5]
    assert len({shot for _, shot in many}) == len({shot.seed for _, shot in many}) == 40
    assert {ask for ask, _ in many[:8]} == set(own.asks)  # every prompt before any comes again
    assert not {s for _, s in many} & {s for _, s in groups.shots(own, 40, seed=2)}
    # Two groups that ask for the same share the image.
    (pairs, *_) = groups.base_groups()
    everything = {s for _, s in groups.shots(pairs, len(pairs.asks), seed=1)}
    assert {s for ask, s in many[:8] if ask in pairs.asks} <= everything


# --- statistics


def test_wilson_equals_values_worked_out_by_hand():
    # 8 of 10: (0.8 + 3.841459 / 20 -+ 1.959964 sqrt(0.016 + 3.841459 / 400)) / 1.3841459
    assert intervals.wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert intervals.wilson(0, 10) == pytest.approx((0, 3.841459 / 13.841459), abs=1e-7)
    assert intervals.wilson(10, 10) == pytest.approx((10 / 13.841459, 1), abs=1e-7)
    assert intervals.wilson(0, 10)[0] == 0.0 and intervals.wilson(10, 10)[1] == 1.0


def test_the_mean_has_its_normal_interval():
    estimate = intervals.mean(np.array([0.2, 0.4, 0.6, 0.8]))
    half = 1.959964 * np.sqrt(0.2 / 3) / 2  # squares about the mean of 0.5 sum to 0.2
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    above = intervals.mean(np.array([1.2, 1.4, 1.3]))  # LPIPS may be above 1, where SSIM ends
    assert above.low < above.value < above.high
    one = intervals.mean(np.array([0.3]))
    assert (one.low, one.high, one.n) == (-1, 1, 1)


@pytest.mark.parametrize("window", [7, 25])
def test_ssim_equals_scikit_image(window):
    metrics = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    drawn = [artwork.draw(o, s) for o, s in vocabulary.pairs()[::9]]
    noise = list(rng.integers(0, 256, (5, 64, 64, 3), np.uint8))
    flat = [np.full((64, 64, 3), v, np.uint8) for v in (0, 3, 255)]
    a = np.stack([*drawn, *noise, *flat])
    b = np.stack([*drawn[1:], *noise, *flat, drawn[0]])
    expected = [
        metrics.structural_similarity(x, y, win_size=window, channel_axis=-1) for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(likeness.ssim(a, b, window), expected, atol=1e-4)
    np.testing.assert_array_equal(likeness.ssim(a, a, window), 1)
