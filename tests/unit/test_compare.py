"""The comparison of methods and their curves: what is erased, kept on disk, worked out and shown."""

import json
import sys

import numpy as np
import painter
import pytest

import esd_jax
from esd_jax import api, recipe
from esd_jax.config_files import config_names
from esd_jax.demo import groups
from esd_jax.demo.testbed import EMOJI
from esd_jax.io.exact import read_exact, with_strength
from esd_jax.methods import METHODS
from launch.experiments import compare_methods, method_curves


@pytest.fixture
def fakes(monkeypatch):
    return painter.hired(monkeypatch)


def erasing(monkeypatch, module, erasures):
    def erase(base, concepts, **fields):
        erasures.append((concepts, fields))
        return "sham" if concepts[0].split()[-1] in groups.NONSENSE or "xqzv" in concepts[0] else "erased"

    monkeypatch.setattr(module.api, "load", lambda source: "base")
    monkeypatch.setattr(module.api, "erase", erase)
    monkeypatch.setattr(module, "source_hash", lambda base: "0" * 64)


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


def test_every_method_and_kind_has_a_recipe_that_can_be_read():
    trained = {name: entry for name, entry in compare_methods.ENTRIES.items() if entry.recipes}
    assert set(trained) == set(METHODS)
    for name, entry in trained.items():
        for kind, config in entry.recipes.items():
            plan = compare_methods.carried_out(config, groups.parse_target({"style": "neon", "object": "cat"}[kind]))
            assert plan["method"] == name and not {"base", "concept"} & set(plan)
            if name != "esd":  # what --method takes, of the embedded model and of Stable Diffusion
                assert {EMOJI.config(name, kind), name} <= set(config_names())
    assert set(method_curves.TRAINED) == {name for name in METHODS if METHODS[name].trained}


def test_what_a_recipe_preserves_is_not_what_is_erased():
    (config,) = {compare_methods.ENTRIES["uce"].recipes["object"]}
    plan = compare_methods.carried_out(config, groups.parse_target("a dog, a rose"))
    assert plan["preserve"] and not {"dog", "rose"} & set(plan["preserve"].split())


@pytest.mark.parametrize("name", ["ink", "pop art"])
def test_a_name_of_several_words_is_not_preserved_either(name):
    config = compare_methods.ENTRIES["redirect"].recipes["style"]
    all_of = recipe.read(config).to_dict()
    plan = compare_methods.carried_out(config, groups.parse_target(name))
    before, after = (fields["preserve"].split(" | ") for fields in (all_of, plan))
    assert after == [prompt for prompt in before if name not in prompt] and 0 < len(after) < len(before)


def test_the_comparison_goes_on_where_it_stopped(fakes, monkeypatch, tmp_path, capsys):
    erasures = []
    erasing(monkeypatch, compare_methods, erasures)
    monkeypatch.setattr(compare_methods, "one_prompt", lambda base, target: True)  # the base is no pipeline here
    arguments = (
        f"--output={tmp_path}",
        "--images=8",
        "--methods=esd; negative prompt",
        "--targets=neon; a cat, a rose",
    )
    run(monkeypatch, compare_methods, *arguments)
    assert [concepts for concepts, _ in erasures] == [
        ["neon style"], ["xqzv style"], ["a cat", "a rose"], ["a xqzv", "a xqvz"],
    ]  # fmt: skip
    options = [options for options in fakes.options if options]
    assert {options["negative_prompt"] for options in options} == {
        "neon style", "xqzv style", "a cat, a rose", "a xqzv, a xqvz",
    }  # fmt: skip
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    neon = comparison["neon style"]
    assert (neon["esd"]["base"], neon["esd"]["target"], neon["esd"]["sham_target"]) == (1, 0, 1)
    assert neon["negative prompt"]["target"] == 1  # the painter does not look at negative prompts
    assert "implicit_base" not in neon["esd"] and comparison["a cat, a rose"]["esd"]["implicit_base"] > 0
    first = capsys.readouterr().out
    assert "### Erasing a cat, a rose" in first and first.count("| negative prompt |") == 2

    drawn, trained = len(fakes.calls), len(erasures)
    run(monkeypatch, compare_methods, *arguments)
    assert (len(fakes.calls), len(erasures)) == (drawn, trained)
    assert first.endswith(capsys.readouterr().out)
    with pytest.raises(ValueError, match="other settings"):
        run(monkeypatch, compare_methods, *arguments, "--seed=2")
    with pytest.raises(ValueError, match="unknown method 'magic'; choose from esd"):
        run(monkeypatch, compare_methods, f"--output={tmp_path}", "--methods=magic")


def test_longer_erasures_are_results_of_their_own(fakes, monkeypatch, tmp_path, unchecked):
    erasures = []
    erasing(monkeypatch, compare_methods, erasures)
    arguments = (f"--output={tmp_path}", "--images=2", "--methods=esd; uce", "--targets=a cat", "--nocontrols")
    for longer in (1, 3):
        run(monkeypatch, compare_methods, *arguments, f"--longer={longer}")
    esd, _, again = (fields for _, fields in erasures)  # the closed form has no updates, and is not measured again
    assert again["steps"] == 3 * esd["steps"]
    assert {file.name for file in tmp_path.glob("esd-*.json")} == {"esd-a_cat.json", "esd-a_cat-3x.json"}


def test_more_concepts_than_a_prompt_holds():
    base = esd_jax.load("emoji")
    few, many = (groups.parse_target(", ".join(names)) for names in (["a cat", "a rose"], TEN))
    assert compare_methods.one_prompt(base, few) and not compare_methods.one_prompt(base, many)


TEN = ["a cat", "a rose", "a pizza", "a rocket", "a robot", "an owl", "a house", "a cake", "a bee", "a fox"]


def test_the_table_is_aligned():
    results = {"SLD max": {}, "esd": dict.fromkeys(WHOLE, 0.5)}
    lines = compare_methods.markdown({"neon style": results}).splitlines()
    assert "| SLD max | its prompt is too long |" in lines[-2]
    assert len({line.count("|") for line in lines[2:] if line}) == 1
    assert "| esd | 50.0% | 50.0% | 50.0% | 50.0 |" in lines[-1]


WHOLE = (
    "base", "target", "unrecognised", "ssim", "ssim25", "seed_ssim", "seed_ssim25", "implicit_base", "implicit_erased",
    "nearest_lost", "others_lost", "unrelated_lost", "sham_target", "sham_ssim", "steps", "seconds",
)  # fmt: skip


def test_a_curve_is_drawn_and_kept(fakes, monkeypatch, tmp_path, capsys, unchecked):
    pytest.importorskip("matplotlib")
    erasures = []
    erasing(monkeypatch, method_curves, erasures)
    arguments = (f"--output={tmp_path}", "--images=4", "--figure=penalty", "--target=a cat")
    run(monkeypatch, method_curves, *arguments)
    changes = [(fields["subset"], fields["penalty"]) for _, fields in erasures]
    assert changes == [(s, p) for s in method_curves.SUBSETS for p in method_curves.PENALTIES]
    points = json.loads((tmp_path / "penalty.json").read_text())["points"]
    assert all((p["own_target"], p["own_base"]) == (0, 1) for p in points) and len(points) == 10
    assert (tmp_path / "penalty.png").stat().st_size > 0
    run(monkeypatch, method_curves, *arguments)
    assert len(erasures) == 10  # nothing again
    with pytest.raises(ValueError, match="other settings"):
        run(monkeypatch, method_curves, *arguments[:3], "--target=a dog")


def test_the_contrast_of_two_recipes(fakes, monkeypatch, tmp_path, capsys, unchecked):
    pytest.importorskip("matplotlib")
    erasures = []
    erasing(monkeypatch, method_curves, erasures)
    monkeypatch.setattr(method_curves, "with_strength", lambda pipeline, strength: pipeline)
    arguments = (f"--output={tmp_path}", "--images=4", "--figure=contrast")
    run(monkeypatch, method_curves, *arguments, "--target=a cat")
    assert [fields["config"] for _, fields in erasures] == ["emoji", "emoji_object"]  # once for all its strengths
    points = json.loads((tmp_path / "contrast.json").read_text())["points"]
    assert len(points) == 8 and all({"own_target", "implicit_target", "implicit_base"} <= set(p) for p in points)
    assert not any("others_lost" in p for p in points)
    assert "ESD-x            detection rate on implicit prompts, at target rates" in capsys.readouterr().out
    (tmp_path / "contrast.json").unlink()
    with pytest.raises(ValueError, match="'neon style' has no prompts that imply it"):
        run(monkeypatch, method_curves, *arguments, "--target=neon style")


def test_where_a_curve_passes_a_target_rate():
    curve = [
        {"own_base": 1.0, "implicit_base": 0.4, "own_target": 0.6, "others_ssim25": 0.9, "implicit_target": 0.2},
        {"own_base": 1.0, "implicit_base": 0.4, "own_target": 0.2, "others_ssim25": 0.8, "implicit_target": 0.1},
    ]
    assert method_curves.at_rate(curve, 0.3, "others_ssim25") == "0.825"
    assert method_curves.at_rate(curve, 0.8, "others_ssim25") == "0.950"  # between the base and the first point
    assert method_curves.at_rate(curve, 0.8, "implicit_target") == "0.300"
    assert method_curves.at_rate(curve, 0.1, "others_ssim25") == "-"


@pytest.mark.slow
def test_a_change_is_scaled_and_checkpoints_are_points():
    """On the embedded model: strength 1 is the erased model, and a run's last checkpoint its result."""
    base, target = api.load("emoji"), groups.parse_target("neon")
    results = [
        (setting, make())
        for setting, make in method_curves.updates(base, target, "emoji", 2, {"method": "esd"}, steps=4)
    ]
    assert [setting for setting, _ in results] == [{"method": "esd", "step": 2}, {"method": "esd", "step": 4}]
    erased = api.erase(base, target.concepts, config="emoji", steps=4)
    whole, half = (with_strength(erased, strength).edits for strength in (1.0, 0.5))
    first = read_exact(base, list(whole))
    for name, value in erased.edits.items():
        np.testing.assert_allclose(whole[name], value, atol=1e-6)
        np.testing.assert_allclose(half[name] - first[name], (value - first[name]) / 2, atol=1e-6)
        np.testing.assert_array_equal(results[1][1].edits[name], value)
