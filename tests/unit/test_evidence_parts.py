"""Results from several commands: what counts of each, and what may not be put together."""

import dataclasses
import json

import numpy as np
import pytest
from attacked import share
from evaluated import base_and_run, whole
from messages import one_line

from esd_jax import cli, dossier, runs
from esd_jax.erasure import Concept, Erasure
from esd_jax.evaluation import store
from esd_jax.evaluation.attacks.scoring import Scored
from esd_jax.evaluation.evidence import Evidence, Finding, Pair, Table
from esd_jax.evaluation.report import outcome, verdict
from esd_jax.io.safetensors import read_header


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return base_and_run(tmp_path_factory.mktemp("models"))


def attack(name, hits, n=40):
    return Finding("attack", name, share(n, n), share(hits, n), share(0, 500))


def test_an_attack_of_one_prompt_can_come_back():
    hits = np.ones((1, 10), bool)
    one = Scored("tier: the name alone", hits, np.zeros((1, 10, 8, 8, 3), np.uint8), (0,)).single_shot()
    assert one == share(10, 10)
    finding = Finding("attack", "tier: the name alone", one, one, share(0, 500))
    assert outcome.came_back(finding) and outcome.informative(finding)
    two = Scored("two", np.ones((2, 5), bool), np.zeros((2, 5, 8, 8, 3), np.uint8), (0, 1)).single_shot()
    assert two.low < one.low  # the images of a trial are alike


def test_a_further_attack_keeps_the_first():
    shares, plain = ("base", "erased"), (("target prompts", (1.0, 0.0)),)
    first = Evidence(
        "x", measured_with={"attacks": "seed 0", "attack: a": {}}, verdict=(attack("a", 32), attack("b", 1)),
        attacks=(Table("Attacks", shares, (*plain, ("a", (1.0, 0.8)), ("b", (1.0, 0.1))), "N.", shares),),
    )  # fmt: skip
    wide = (*shares, "placebo")
    rows = (("target prompts", (1.0, 0.0, 0.9)), ("b", (1.0, 0.3, 0.9)))
    second = Evidence(
        "x", measured_with={"attacks": "seed 0", "attack: b": {}}, verdict=(attack("b", 12),),
        attacks=(Table("Attacks", wide, rows, "N. More.", wide), Table("Probes", shares, (), "P.", shares)),
    )  # fmt: skip
    joined = store.joined(first, second)
    assert [(f.what, f.after.value) for f in joined.verdict] == [("a", 0.8), ("b", 0.3)]
    assert joined.attacks[0].rows == (
        ("target prompts", (1.0, 0.0, 0.9)),
        ("a", (1.0, 0.8, None)),
        ("b", (1.0, 0.3, 0.9)),
    )
    assert joined.attacks[0].note == "N. More." and joined.attacks[0].percent == wide and len(joined.attacks) == 2
    assert joined.measured_with.keys() == {"attacks", "attack: a", "attack: b"}
    assert "came back" in verdict.sentence(joined) and "32 of 40" in verdict.sentence(joined)


def test_settings_are_named_after_the_protocols_that_do_not_share_them():
    one = Evidence("x", measured_with={"protocol": "emoji, 200 images", "seed": 1, "detector": "a"})
    other = Evidence("x", measured_with={"protocol": "custom, 8 images", "seed": 1, "detectors": ["b"]})
    attacks = Evidence("x", measured_with={"attacks": "seed 0"})
    assert store.merged("x", Erasure(), [one, other, attacks]).measured_with == {
        "protocol (emoji)": "emoji, 200 images", "seed": 1, "detector": "a", "protocol (custom)": "custom, 8 images",
        "detectors": ["b"], "attacks": "seed 0",
    }  # fmt: skip
    assert store.merged("x", Erasure(), [one, attacks]).measured_with["protocol"] == "emoji, 200 images"


def custom(name, value, prompts=("a dog",)):
    blank = np.zeros((8, 8, 3), np.uint8)
    table = Table("Similarity", ("erased",), (("all", (value,)),))
    how = {"protocol": "custom, 1 images of each model", "prompts": f"{name}, sha256 0123456789abcdef, 1 x 1"}
    pictures = {"prompts of the protocol": tuple(Pair(prompt, blank, blank) for prompt in prompts)}
    return Evidence("x", measured_with=how, tables=(table,), pictures=pictures)


def test_results_of_two_lists_are_kept_side_by_side(tmp_path):
    """Of one list, the newer ones replace the older."""
    for name, value in (("dogs.csv", 0.5), ("my cats.csv", 0.7), ("dogs.csv", 0.6)):
        one = custom(name, value, (f"of {name}",))
        store.save(one, tmp_path, store.free(tmp_path, "evaluation-custom", one))
    parts = store.parts(tmp_path)
    assert parts.keys() == {"evaluation-custom", "evaluation-custom-my-cats-csv"}
    shown = store.merged("x", Erasure(), parts.values())
    assert {table.title: table.rows[0][1] for table in shown.tables} == {
        "Similarity (custom, dogs.csv)": (0.6,), "Similarity (custom, my cats.csv)": (0.7,),
    }  # fmt: skip
    assert {title: pairs[0].prompt for title, pairs in shown.pictures.items()} == {
        "prompts of the protocol (custom, dogs.csv)": "of dogs.csv",
        "prompts of the protocol (custom, my cats.csv)": "of my cats.csv",
    }
    assert "protocol" in shown.measured_with  # which they share
    alone = store.merged("x", Erasure(), [custom("dogs.csv", 0.5)])
    assert alone.tables[0].title == "Similarity" and set(alone.pictures) == {"prompts of the protocol"}


@pytest.mark.parametrize("names", [("a.b.csv", "a-b.csv", "a b.csv"), ("猫.csv", "犬.csv", "鳥.csv")])
def test_lists_whose_names_are_nearly_the_same_are_kept_apart(names, tmp_path):
    for name in ("first.csv", *names, *names):
        store.save(one := custom(name, 0.5), tmp_path, store.free(tmp_path, "evaluation-custom", one))
    kept = {store.listed(part) for part in store.parts(tmp_path).values()}
    assert kept == {"first.csv", *names} and len(store.parts(tmp_path)) == 4


def test_tables_of_one_protocol_with_more_and_fewer_images_are_told_apart():
    def of(images):
        table = Table("Groups", ("n",), (("own", (images,)),))
        how = {"protocol": f"emoji, {images} images of each group (a quarter or half)"}
        return Evidence("x", measured_with=how, tables=(table,))

    titles = [table.title for table in store.merged("x", Erasure(), [of(8), of(64)]).tables]
    assert titles == [f"Groups (emoji, {n} images of each group)" for n in (8, 64)]


def test_of_other_concepts_the_figures_of_the_most_images_count():
    few = Finding("kept", "related concepts: style accuracy", share(24, 24), share(22, 24))
    many = Finding("kept", "related concepts: object accuracy", share(198, 200), share(197, 200))
    same = Finding("kept", "related concepts: style accuracy", share(200, 200), share(190, 200))
    kept = lambda *findings: outcome.of(Evidence("x", verdict=findings)).kept  # noqa: E731
    assert [change.after.n for change in kept(few, many)] == [200]
    assert len(kept(few, many, same)) == 2


def test_a_report_is_no_part(tmp_path):
    store.save(whole(), tmp_path, "evaluation-quick")
    for _ in range(2):
        dossier.report(tmp_path)
    assert (tmp_path / "report.json").is_file() and store.parts(tmp_path).keys() == {"evaluation-quick"}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X"}))
    assert store.parts(tmp_path).keys() == {"evaluation-quick"}
    assert store.readable(tmp_path / "evaluation-quick.json") and not store.readable(tmp_path / "attacks.json")
    (tmp_path / "evaluation-quick.npz").unlink()
    assert store.readable(tmp_path / "evaluation-quick.json") is None
    with pytest.raises(ValueError, match=one_line("evaluation-quick.json", "measure it again")):
        store.parts(tmp_path)


def test_results_of_other_concepts_stay_out_of_a_runs(models, tmp_path):
    _, erased, folder = models
    folder, (text,) = folder / "run", erased.provenance.erased[-1].texts
    runs.check_measured(folder / runs.EVIDENCE, erased, [text.upper()], every=True)
    runs.check_measured(tmp_path, erased, ["a dog"], every=True)
    two = dataclasses.replace(erased.provenance.erased[-1], concepts=(Concept(text), Concept("a rose")))
    both = dataclasses.replace(erased, provenance=dataclasses.replace(erased.provenance, erased=(two,)))
    runs.check_measured(folder / runs.EVIDENCE, both, [text])
    for model, concepts, every in ((erased, ["a dog"], False), (both, [text], True)):
        with pytest.raises(ValueError, match=one_line(repr(concepts[0]), "another output")):
            runs.check_measured(folder / runs.EVIDENCE, model, concepts, every=every)
    with pytest.raises(ValueError, match="another output"):
        dossier.evaluate(erased, erased, "quick", output_dir=folder / runs.EVIDENCE, concept="a dog")


def test_a_part_of_the_change_does_not_get_the_runs_card(models, capsys):
    """Neither a report nor an export describes it with the figures of the whole change."""
    _, erased, folder = models
    run, half = folder / "run", folder / "run" / "exports" / "half"
    evidence = Evidence("cat", erased.provenance.erased[-1], verdict=(attack("P4D", 1),))
    store.save(evidence, run / runs.EVIDENCE, "attacks")
    command = ["export", f"--run={run}", "--strength=0.5", "--format=folder", f"--output={half}"]
    assert cli.main([*command, f"--base={folder / 'base'}"]) == 0
    dossier.report(run)
    card = (half / "README.md").read_text()
    assert "0.5 of the erasure's weight change" in card and "P4D" not in card
    assert "P4D" in (run / "model" / "README.md").read_text()
    for file, whole_change in ((half / "unet", False), (run / "model" / "unet", True)):
        metadata = read_header(next(file.glob("*.safetensors"))).metadata
        assert ("esd_jax.verdict" in metadata) is whole_change
