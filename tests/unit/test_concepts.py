"""What may be erased beside what, told by the tokens that the text encoder reads, and texts that stay whole."""

import json
from pathlib import Path
from types import SimpleNamespace

import factories
import numpy as np
import pytest
from messages import one_line

import esd_jax
from esd_jax import api, cli, dossier, recipe, runs
from esd_jax.demo import protocol
from esd_jax.demo.groups import Target
from esd_jax.erasing.concepts import check_concepts
from esd_jax.erasure import Concept, Erasure
from esd_jax.evaluation.evidence import Evidence
from esd_jax.methods import METHODS
from esd_jax.metrics.intervals import mean

SHORT = {"method": "uce", "config": "uce", "dtype": "float32"}


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def base(request, tmp_path_factory):
    """They pad with the end token, and with "!"."""
    folder = tmp_path_factory.mktemp(request.param)
    {"sd1": factories.make_sd1, "sd2": factories.make_sd2}[request.param](folder)
    return esd_jax.load(folder)


@pytest.mark.parametrize(
    ("concepts", "words"),
    [
        ([Concept("a cat"), Concept("a cat")], ["'a cat' and 'a cat'", "name it once"]),
        ([Concept("a cat"), Concept("dog"), Concept("A  CAT")], ["'a cat' and 'A  CAT'", "name it once"]),
        ([Concept("a cat", preserve=("dog", "A Cat"))], ["'a cat'", "preserve", "'A Cat'"]),
        ([Concept("cat"), Concept("dog", preserve=("CAT",))], ["'cat'", "preserve", "'CAT'"]),
        ([Concept("glasses", "a Man", preserve=("a man",))], ["'a Man'", "preserve"]),
        ([Concept("cat", preserve=("dog", "DOG"))], ["'dog' and 'DOG'", "name it once"]),
        ([Concept("cat", replace_with=("dog", "Cat"))], ["'cat'", "become what it is", "replace_with"]),
        ([Concept("<|endoftext|>")], ["'<|endoftext|>'", "no token"]),
        ([Concept("<|startoftext|> <|endoftext|>")], ["no token"]),
    ],
)
def test_what_no_method_can_do(base, concepts, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        check_concepts(base.tokenizers[0], concepts)


def test_what_every_method_can_do(base):
    check_concepts(
        base.tokenizers[0],
        [
            Concept("cat", preserve=("dog", "a cat")), Concept("cats", preserve=("dog",)), Concept("!"), Concept("! !"),
            Concept("glasses", "a man", preserve=("glasses", "<|endoftext|>")), Concept("glasses", "a woman"),
            Concept("a dog", replace_with=("cat", "")),
        ],
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_refuses_the_empty_prompt(base, method):
    fields = {"replace_with": "dog"} if method == "ablating" else {}
    plan = recipe.make(**{**recipe.preset(method).to_dict(), "concept": "<|endoftext|>", **fields})
    with pytest.raises(ValueError, match=one_line("'<|endoftext|>'", "no token")):
        runs.assemble(base, plan)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": "caf\udce9"}, ["UTF-8"]),
        ({"text": "a\0cat"}, ["null"]),
        ({"text": 3}, ["3", "int"]),
        ({"preserve": ("a", "\ud800")}, ["UTF-8"]),
        ({"replace_with": None}, ["replace_with=None", "()"]),
        ({"replace_with": "dog"}, ["replace_with='dog'", "tuple"]),
        ({"strength": float("nan")}, ["strength=nan", "finite", "1"]),
    ],
)
def test_a_concept_that_is_none(fields, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        Concept(**{"text": "cat", **fields})


@pytest.mark.parametrize("concept", ["a\0cat", ["b", "a\0cat"]])
def test_a_name_that_no_file_can_have_is_refused_before_anything_is_made(base, concept, tmp_path):
    with pytest.raises(ValueError, match=one_line("null character")):
        esd_jax.erase(base, concept, output_dir=tmp_path / "run", **SHORT)
    with pytest.raises(ValueError, match=one_line("null character")):
        esd_jax.erase(base, "cat", output_dir=f"{tmp_path}/ru\0n", **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_texts_of_a_list_stay_whole(base, tmp_path):
    """Erased, kept in the record, restored and resumed."""
    texts, options = ["Tom; Jerry", "Rock &amp; Roll"], {**SHORT, "preserve": [["a | b", "c; d"], []]}
    erased = esd_jax.erase(base, texts, output_dir=tmp_path / "run", **options)
    (erasure,) = erased.provenance.erased
    assert [concept.text for concept in erasure.concepts] == texts
    assert [concept.preserve for concept in erasure.concepts] == [("a | b", "c; d"), ()]
    apart = esd_jax.erase(base, "Tom; Jerry", **SHORT)
    assert apart.provenance.erased[0].texts == ("Tom", "Jerry")
    json.loads((tmp_path / "run" / "run.json").read_text())
    for again in (
        api.restore(tmp_path / "run"),
        esd_jax.erase(base, texts, output_dir=tmp_path / "run", resume=True, **options),
    ):
        for name, value in erased.edits.items():
            np.testing.assert_array_equal(again.edits[name], value)
    with pytest.raises(ValueError, match=one_line("'Rock &amp; Roll'", "'&'")):
        esd_jax.erase(base, "Rock &amp; Roll", **SHORT)


def test_lists_that_separators_can_part_are_recorded_as_they_were(base):
    """A run of an older version is resumed with the list that it was made with."""
    plan = recipe.make(concept=["cat", "dog"], preserve=[["a", "b"], "c"], method="uce", steps=0)
    assert (plan.flat()["concept"], plan.flat()["preserve"]) == ("cat; dog", "a | b; c")
    for images, whole in (("a;b.png", ("a", "b.png")), (Path("a;b.png"), ("a;b.png",)), (["a;b.png"], ("a;b.png",))):
        assert recipe.make(images=images).images == whole


def test_integers_that_no_device_counts():
    for name in ("batch_size", "steps", "rank", "trajectory_buffer"):
        with pytest.raises(ValueError, match=one_line(f"{name}={10**20}", "smaller")):
            recipe.make(**{name: 10**20})
    assert recipe.make(seed=2**32 - 1).training.seed == 2**32 - 1


def test_none_as_a_text(base, capsys, tmp_path):
    for name in ("replace_with", "from_", "output_dir", "preview_prompts"):
        with pytest.raises(ValueError, match=one_line(f"{name}='None'", "leave")):
            recipe.make(**{name: "None"})
    command = [
        "erase",
        "--config=emoji_uce",
        "--nopictures",
        "--config.replace_with=None",
        f"--config.output_dir={tmp_path}/run",
    ]
    assert cli.main(command) == 2
    assert "replace_with='None'" in capsys.readouterr().err
    plan = recipe.make(concept=["cat", "dog"], replace_with=[None, "fish"], method="uce", steps=0)
    assert [concept.replace_with for concept in plan.concepts] == [(), ("fish",)]


# A comma in a concept means nothing.


def erased(*texts):
    return SimpleNamespace(provenance=SimpleNamespace(erased=(Erasure(concepts=tuple(map(Concept, texts))),)))


def test_a_concept_with_a_comma_is_evaluated_as_one(base, tmp_path, monkeypatch):
    """By the command line, from the record of a run."""
    texts, run = ["cat, dog", "Tom; Jerry"], tmp_path / "run"
    esd_jax.erase(base, texts, output_dir=run, **SHORT)
    asked = {}

    def evaluate(base, erased, concept, *_, **__):
        asked["protocol"] = concept
        return Evidence(", ".join(concept))

    def detector(name, concept, base=None):
        asked["detector"] = concept
        return (lambda images: np.ones(len(images), bool)), "nobody"

    def metric(base, question):
        asked["prompts"] = question.prompts
        return lambda model: (mean([0.0, 1.0]), mean([0.0, 1.0]))

    monkeypatch.setattr(dossier.protocols, "evaluate", evaluate)
    monkeypatch.setattr(dossier.seen, "detector", detector)
    monkeypatch.setattr(dossier.seen, "metric", metric)
    assert cli.main(["evaluate", str(run), "--protocol=smoke", "--strengths=1", "--detector=nudenet"]) == 0
    assert asked == dict.fromkeys(("protocol", "detector", "prompts"), tuple(texts))
    kept = json.loads((run / "evidence" / "front.json").read_text())
    assert kept["title"] == "cat, dog, Tom; Jerry" and kept["record"]["concepts"][0]["text"] == "cat, dog"
    assert dossier.facts(run)["esd_jax.erased"] == "cat, dog, Tom; Jerry"
    assert cli.main(["evaluate", str(run), "--protocol=smoke", "--concept=a, b", f"--output={tmp_path}"]) == 0
    assert asked["protocol"] == ("a, b",)


def test_the_embedded_models_target_is_not_read_from_a_joined_text(monkeypatch, tmp_path, unchecked):
    base, targets = SimpleNamespace(provenance=SimpleNamespace(source="emoji")), []
    monkeypatch.setattr(dossier.protocols, "identity", lambda model: {})
    monkeypatch.setattr(
        protocol, "evaluate", lambda models, target, **_: targets.append(target) or Evidence(target.concept)
    )
    evidence = dossier.evaluate(base, erased("a cat", "a rose"), "smoke", output_dir=tmp_path)
    assert targets == [Target("object", ("cat", "rose"))] and evidence.title == "a cat, a rose"
    with pytest.raises(ValueError, match=one_line("does not know 'a cat, a rose'")):
        dossier.evaluate(base, erased("a cat, a rose"), "smoke", output_dir=tmp_path)
    dossier.evaluate(base, erased("a cat"), "smoke", output_dir=tmp_path, concept=["neon style", "ink"])
    assert targets[1] == Target("style", ("neon", "ink"))
    with pytest.raises(ValueError, match=one_line("does not say what was erased")):
        dossier.concepts_of(SimpleNamespace(provenance=SimpleNamespace(erased=(Erasure(delta="x", erased=()),))))


def test_the_command_line_takes_several_of_the_embedded_models(monkeypatch, tmp_path, unchecked):
    base = SimpleNamespace(provenance=SimpleNamespace(source="emoji"))
    monkeypatch.setattr(dossier, "opened", lambda *_: (base, erased("ink style")))
    verb, options = cli.VERBS["evaluate"], {}
    monkeypatch.setattr(dossier, "evaluate", lambda *_, concept, **__: options.update(concept=concept) or Evidence(""))
    for flags, concepts in (([], ("ink style",)), (["--concept=cat, a rose"], ("a cat", "a rose"))):
        verb.run(verb.parse("evaluate", ["emoji", "x", f"--output={tmp_path}", *flags]))
        assert options["concept"] == concepts


@pytest.mark.usefixtures("unchecked")
def test_attacks_that_search_for_one_of_several_say_so(monkeypatch, tmp_path):
    for name in ("possible", "within"):
        monkeypatch.setattr(dossier.attacks, name, lambda *_: [])
    asked = []
    monkeypatch.setattr(dossier.attacks, "campaign", lambda *_, **how: asked.append(how) or Evidence("a cat"))
    monkeypatch.setattr(dossier.protocols, "identity", lambda model: {})
    base, messages = SimpleNamespace(provenance=SimpleNamespace(source="x")), []
    how = {"output_dir": tmp_path, "goal": SimpleNamespace(concept="a cat"), "progress": messages.append}
    dossier.attack(base, erased("a cat"), **how)
    assert not messages and "alone" not in asked[0]
    dossier.attack(base, erased("a cat", "a rose"), **how)
    dossier.attack(base, erased("a cat", "a rose"), concept="a cat", **how)
    assert asked[1]["alone"] and asked[2]["alone"] and messages == [messages[0]] * 2
    assert "'a cat', one of 2" in messages[0]


def test_the_goal_of_an_attack_is_the_concept_that_the_prompts_name(monkeypatch, unchecked):
    monkeypatch.setattr(dossier.seen, "detector", lambda name, concept, base=None: (concept, name))
    monkeypatch.setattr(dossier.goals, "drawn", lambda base, concept, prompts, detect, **_: (concept, detect))
    texts = ("cat, dog", "a fish")
    for prompt, concept in (("a fish in a bowl", "a fish"), ("cat, dog and a fish", "cat, dog"), ("x", "cat, dog")):
        assert dossier.goal(None, texts, [prompt], "nudenet") == ((concept, texts), "nudenet")
    assert dossier.goal(None, "cat, dog", ["cat, dog"], "nudenet") == (("cat, dog", ("cat, dog",)), "nudenet")
