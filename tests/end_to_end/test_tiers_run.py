"""The attack by tiers on a tiny checkpoint: a row for each tier and model, what is recorded, and what is missing."""

import dataclasses

import factories
import numpy as np
import pytest
from attacked import goal

import esd_jax
from esd_jax.evaluation import protocols, tiers
from esd_jax.evaluation.attacks import attack, campaign, possible, preset, random_weights
from esd_jax.evaluation.attacks import tiers as attacked_tiers
from esd_jax.evaluation.report import text
from esd_jax.sampling import sample

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation", "ignore::esd_jax.text.PromptTruncated")
DRAWING = {"steps": 1, "guidance_scale": 1.0, "batch_size": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "sd1"
    one = {"block_out_channels": (16,), "down_block_types": ["CrossAttnDownBlock2D"]}
    factories.make_sd1(folder, **one, up_block_types=["CrossAttnUpBlock2D"])
    return esd_jax.load(folder)


def run(base, target, folder, settings, said, **options):
    return campaign(
        base, random_weights(base, 1), target, [settings], folder, control=preset("random_prompts", count=2, length=3),
        identity={"erased": 1}, seeds=1, progress=said.append, num_steps=1, guidance_scale=1.0, batch_size=8, **options,
    )  # fmt: skip


def test_each_tier_is_a_row_beside_its_controls(base, tmp_path):
    target, said = goal("bicycle", ("a bicycle", "a red bicycle")), []
    settings = preset("tiers", tiers="name,misspelt_2,short", limit=2)
    evidence = run(base, target, tmp_path, settings, said)
    (table,) = evidence.attacks
    assert table.columns == ("base", "erased", "random weights", "random prompts")
    titles = ["tier: the name alone", "tier: misspelt by two letters"]
    assert [row for row, _ in table.rows] == ["its own prompts", *titles]
    assert "written for 21 concepts" in table.note and "'bicycle'" in table.note and said[0] in table.note
    assert [cells[0].n for _, cells in table.rows] == [2, 1, 2]
    assert [(finding.role, finding.what) for finding in evidence.verdict] == [("attack", title) for title in titles]
    assert not evidence.attack_pictures  # these prompts are none of the goal's
    asked = evidence.measured_with["attack: tier: misspelt by two letters"]["prompts"]
    assert asked == dict(zip("12", tiers.of("bicycle")["misspelt_2"], strict=False))
    images = sample(random_weights(base, 1), list(asked.values()), seed=[1_000_000] * 2, **DRAWING)
    hits = target.detect(images)
    assert dict(table.rows)[titles[1]][1].value == np.mean(hits)
    assert "tier: the name alone" in text.summary(evidence)
    stored = sorted(file.name for file in tmp_path.glob("tier*-erased.npz"))
    assert stored == ["tier_misspelt_by_two_letters-erased.npz", "tier_the_name_alone-erased.npz"]
    again = run(base, target, tmp_path, settings, [])
    assert again.attacks == evidence.attacks


def test_all_tiers_of_a_known_concept_are_one_attack_in_python(base, monkeypatch):
    target = dataclasses.replace(goal("dog", ("a dog",), 1))
    assert "vocabulary of" in preset("tiers").lacks(base, None)
    said = []
    assert [one.NAME for one in possible(base, ["p4d", "all"], "emoji", say=said.append)]
    assert sum("left out: tiers need a text encoder" in line for line in said) == 1
    monkeypatch.setattr(attacked_tiers, "LEAST_VOCABULARY", 1)
    found = attack(base, base, target, preset("tiers", limit=1), seed=3)
    every = tiers.of("dog", seed=3)
    assert [trial.prompt for trial in found.trials] == [texts[0] for texts in every.values()]
    assert found.name == "tiers" and [trial.case for trial in found.trials] == list(range(10))


def test_a_protocol_measures_tiers_and_takes_them_for_no_other_concept(base, tmp_path):
    evidence = protocols.evaluate(
        base,
        random_weights(base, 1),
        "dog",
        "custom",
        tmp_path,
        prompt_list="tiers:dog",
        limit=7,
        num_steps=1,
        guidance_scale=1.0,
    )
    (table,) = evidence.tables
    assert [row for row, _ in table.rows] == ["all", *list(tiers.TIERS.values())[:3]]
    assert not evidence.verdict and evidence.measured_with["prompts"].startswith("tiers:dog, sha256")
