"""What a person types after `esd-jax erase`, sorted into fields of the recipe."""

import dataclasses

import pytest
from absl import flags
from messages import one_line
from paths import ROOT

import esd_jax
from esd_jax import api, cli, examples, families, kinds, recipe, recipe_docs
from esd_jax.cli import words
from esd_jax.methods import METHODS
from esd_jax.runs import setup

NEON = {"base": "emoji", "concept": "neon style"}
TYPED = {
    "emoji|neon style": (NEON, []),
    "neon style": ({"concept": "neon style"}, []),
    "emoji|neon style|-o|out/neon": (NEON | {"output_dir": "out/neon"}, []),
    "emoji|--output=out/neon|neon style": (NEON | {"output_dir": "out/neon"}, []),
    "emoji|neon style|--steps=3|--eta|2": (NEON | {"steps": "3", "eta": "2"}, []),
    "emoji|neon style|--config.steps=3|-config.eta|2": (NEON | {"steps": "3", "eta": "2"}, []),
    "--config=emoji|--config.concept=neon style": ({"concept": "neon style"}, []),
    "emoji|neon style|--remat|--nofix_k0": (NEON | {"remat": "true", "fix_k0": "false"}, []),
    "emoji|neon style|--config.remat|--noconfig.fix_k0": (NEON | {"remat": "true", "fix_k0": "false"}, []),
    "emoji|neon style|--dry_run|--arch|sd14|--nopictures": (NEON, ["--dry_run", "--arch=sd14", "--nopictures"]),
    "emoji|--|--steps": ({"base": "emoji", "concept": "--steps"}, []),
    "emoji|--concept=neon style": ({"base": "emoji", "concept": "neon style"}, []),
    "org/name|a cat; a dog": ({"base": "org/name", "concept": "a cat; a dog"}, []),
    "emoji|neon style|--images=x.png|--export=lora,single": (NEON | {"images": "x.png"}, ["--export=lora,single"]),
}


def read(typed: list[str]) -> words.Words:
    types = recipe.field_types()
    options = words.read(typed, cli.VERBS["erase"].defined(), types, {n for n, kind in types.items() if kind is bool})
    words.place(options)
    return options


@pytest.mark.parametrize("typed", TYPED)
def test_words_become_fields_and_flags(typed):
    actual = read(typed.split("|"))
    assert (actual.fields, actual.rest) == TYPED[typed]
    assert actual.config == ("emoji" if "--config=emoji" in typed else None)


def test_no_field_is_called_like_a_flag():
    """But `kind`: the flag chooses a recipe, and with --config it is the field of that name."""
    own = set(cli.VERBS["erase"].defined())
    assert not own & set(recipe.field_types()) and {"config", "kind"}.isdisjoint(own)


@pytest.mark.parametrize(
    ("name", "text", "kind", "words_"),
    [("steps", "two", int, ["--steps=two", "whole number"]), ("eta", "big", float, ["--eta=big", "a number"]),
     ("remat", "maybe", bool, ["--remat=maybe", "true or false"])],
)  # fmt: skip
def test_texts_of_another_type(name, text, kind, words_):
    with pytest.raises(ValueError, match=one_line(*words_)):
        words.check_type(name, text, kind)


@pytest.mark.parametrize(
    ("concept", "folder"),
    [("neon style", "runs/neon-style"), ("a cat; a dog", "runs/a-cat-a-dog"), ("猫", "runs/猫"), ("!", "runs/erased")],
)
def test_the_folder_of_a_run_that_nobody_named(concept, folder):
    assert str(words.folder_of(concept)) == folder


def test_a_list_of_concepts_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my names.txt").write_text("a cat\n\na rose \n")
    for typed in (["emoji", "@my names.txt"], ["--concept=@my names.txt"], ["--config.concept=@my names.txt"]):
        ours = parsed(*typed, "--config=emoji_list")
        assert (ours.config.concept, ours.config.output_dir) == ("a cat; a rose", "runs/my-names")
    assert parsed("@my names.txt", "-o", "out", "--config=emoji_list").config.output_dir == "out"
    assert parsed("@").config.concept == "@"
    (tmp_path / "split.txt").write_text("a cat; a rose")
    with pytest.raises(ValueError, match=one_line("split.txt", "'a cat; a rose'", "own line")):
        parsed("@split.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        parsed("@empty.txt")
    with pytest.raises(FileNotFoundError):
        parsed("@none.txt")


def parsed(*typed: str) -> flags.FlagValues:
    return cli.VERBS["erase"].parse("erase", list(typed))


def test_the_recipe_follows_from_base_and_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    style, thing = parsed("emoji", "neon style", "--steps=7"), parsed("a cat")
    assert (style.config_name, thing.config_name) == ("emoji_contexts", "emoji_object")
    assert (style.config.steps, style.config.concept, style.config.output_dir) == (7, "neon style", "runs/neon-style")
    assert (thing.config.base, thing.config.subset) == ("emoji", "noxattn")
    assert "kind: style" in style.chosen and "--kind=object" in style.chosen
    assert parsed("a cat", "--method=uce").config_name == "emoji_uce_object"
    assert "--kind=style, or" in parsed("a cat", "--method=uce").chosen  # the kinds that select another recipe
    general = parsed("--arch=sd14", "--dry_run", "a cat", "--method=uce").chosen
    assert general == "recipe uce (kind: any); --config=NAME takes another"
    assert parsed("a cat", "--kind=style").config_name == "emoji_contexts"
    assert parsed("a cat", "--config=emoji").config.concept == "a cat"
    named = parsed("--config=ablating_object", "a cat", "--kind=style")  # a setting of that method
    assert (named.config_name, named.config.kind) == ("ablating_object", "style")


def test_a_config_that_was_chosen_does_not_preserve_what_is_erased(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for concept, other in {"a dog": "a fox", "the dog": "a fox", "a cat": "a dog"}.items():  # nor becomes it
        assert parsed("emoji-flow", concept).config.replace_with == other
        assert api.planned("emoji-flow", concept).concepts[0].replace_with == (other,)
    kept = recipe.read("emoji_rece_object").preserve
    assert "a dog" in kept and parsed("a cat", "--method=rece").config.preserve == kept
    assert "a dog" not in parsed("a dog", "--method=rece").config.preserve.split(" | ")
    with pytest.raises(ValueError, match=one_line("preserve", "'a dog'")):
        recipe.make(**{**recipe.read("emoji_rece_object").to_dict(), "concept": "a dog"}).check_concepts()
    with pytest.raises(ValueError, match=one_line("replace_with", "'a dog'")):
        recipe.make(**recipe.preset("uce", concept="a dog", replace_with="A dog").to_dict()).check_concepts()


def test_a_concept_of_a_list_may_not_be_preserved_beside_another_one():
    lists = {"concept": "a dog; a cat", "preserve": "a cow; a pig | A dog"}
    with pytest.raises(ValueError, match=one_line("preserve has 'a dog'", "what is erased", "another preserve")):
        recipe.make(**lists).check_concepts()
    recipe.make(concept="a dog; a cat", preserve="a cow; a pig", replace_with="a cat; a dog").check_concepts()
    with pytest.raises(ValueError, match=one_line("'a person with glasses'", "what is erased")):
        there = {"from_": "a person with glasses; ", "preserve": "; a person with glasses"}
        recipe.make(concept="glasses; a hat", **there).check_concepts()


@pytest.mark.parametrize(
    ("how", "config"), [({"method": "uce"}, "emoji_uce_object"), ({"config": "emoji_list"}, "emoji_list")]
)
def test_a_field_that_is_the_recipes_own_is_named_so(how, config, capsys):
    with pytest.raises(ValueError, match=one_line(f"replace_with, by the recipe '{config}', has 'a dog'")):
        api.planned("emoji", "a dog", **how)
    with pytest.raises(ValueError, match=one_line("replace_with has 'a cow'", "another replace_with")):
        api.planned("emoji", "a cow", replace_with="a cow", **how)
    flags = [f"--{name}={value}" for name, value in how.items()]
    for further in ([], ["--dry_run"]):
        assert cli.main(["erase", "emoji", "a dog", *flags, *further, "-o", "out/none"]) == 2
        assert f"replace_with, by the recipe '{config}', has 'a dog'" in capsys.readouterr().err


def test_comments_in_a_file_of_names_are_no_concepts(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("# animals\na cat\n\n#a dog\na fox\n")
    one = words.Words(fields={"concept": f"@{file}"})
    words.fill(one)
    assert one.fields["concept"] == "a cat; a fox"
    file.write_text("# none\n")
    with pytest.raises(ValueError, match=one_line("names.txt", "comments alone")):
        words.fill(words.Words(fields={"concept": f"@{file}"}))


def test_a_folder_that_is_there_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a-cat").mkdir(parents=True)
    (tmp_path / "runs" / "a-cat" / "run.json").touch()
    with pytest.raises(FileExistsError, match=one_line("runs/a-cat", "--resume", "--overwrite", "-o")):
        parsed("a cat")
    for allowed in ("--resume", "--overwrite", "--dry_run"):
        assert parsed("a cat", allowed).config.output_dir == "runs/a-cat"


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("sd14", ["sd14_style", "sd14_object", "sd14_person", "sd14_nudity", "sd14_attribute"]),
        ("sd21", ["sd21_style", "sd21_object", "sd21_person", "sd21_nudity", "sd21_style"]),
        ("sdxl", ["sdxl_style", "sdxl_object", "sdxl_person", "sdxl_nudity", "sdxl_style"]),
        ("flux-dev", ["flux_style", "flux_object", "flux_person", "flux_nudity", "flux_style"]),
        ("flux-schnell", ["schnell_style", "schnell_object", "schnell_style", "schnell_object", "schnell_style"]),
        ("sd3-medium", ["sd35_style", "sd35_object", "sd35_person", "sd35_nudity", "sd35_style"]),
        ("sd35-large", ["sd35_style", "sd35_object", "sd35_person", "sd35_nudity", "sd35_style"]),
        ("klein-4b", ["klein_style", "klein_object", "klein_style", "klein_object", "klein_style"]),
    ],
)
def test_each_architecture_has_a_recipe_for_each_kind(arch, expected):
    def config(**options):
        return kinds.config("x/y", ["Van Gogh"], lambda: api.architecture(arch)[0], **options)

    assert [config(kind=kind, fields={"from_": "a man"}) for kind in kinds.KINDS] == expected
    assert config() == expected[0]
    assert set(expected) <= set(recipe.config_names())
    flow = "" if arch in ("sd14", "sd21", "sdxl") else "flow_"
    assert config(fields={"method": "ablating"}, kind="object") == f"{flow}ablating_object"
    assert config(fields={"method": "uce"}, kind="object") == f"{flow}uce"


@pytest.mark.parametrize("arch", ["flux-dev", "flux-schnell", "sd3-medium", "sd35-medium", "klein-4b"])
def test_methods_of_a_flow_start_from_recipes_that_it_can_carry_out(arch):
    configs = api.architecture(arch)[0]
    family = families.of(configs)
    possible = []
    for method in METHODS:
        for kind in kinds.KINDS:
            fields = {"method": method, "from_": "a man"}
            try:
                plan = recipe.make(**recipe.read(kinds.config("x/y", ["a"], lambda: configs, kind=kind, fields=fields)))
                family.require(plan.settings.needs, f"method {method!r}")
            except ValueError as error:
                assert "\n" not in str(error) and "my.py" not in str(error)
            else:
                assert (plan.method, (plan.height, plan.width)) == (method, (512, 512))
                assert plan.subset in family.subsets and plan.dtype == "bfloat16"
                possible.append(method)
    free = "classifier_free" in family.meets
    expected = ["esd", *(["all_but_one"] if free else []), "sdd", "ablating", "uce", "rece"]
    assert list(dict.fromkeys(possible)) == expected
    with pytest.raises(ValueError, match=one_line("'ablating'", "kind='memorised'")):
        kinds.config("x/y", ["a"], lambda: configs, kind="memorised", fields={"method": "ablating"})


def test_the_folder_of_an_embedded_flow_has_its_recipes():
    def config(**options):
        return kinds.config("runs/again/model", ["x"], lambda: api.architecture("emoji-flow")[0], **options)

    assert [config(), config(kind="object")] == ["emoji_flow", "emoji_flow_object"]
    with pytest.raises(ValueError, match=one_line("'uce'", "have one: esd)", "recipe.preset('uce', 'flow')")):
        config(fields={"method": "uce"})


def test_a_flow_of_another_package_gets_no_recipe_of_stable_diffusion(monkeypatch):
    configs = api.architecture("flux-dev")[0]
    monkeypatch.setattr(kinds, "RECIPES", {})
    with pytest.raises(ValueError, match=one_line("'esd'", "recipe.preset('esd', 'sd3')")):
        kinds.config("x/y", ["x"], lambda: configs)


@pytest.mark.parametrize("source", ["emoji-flow", "x/y"])
def test_what_a_base_lacks_is_said_before_any_advice(source):
    configs = lambda: api.architecture("emoji-flow")[0]  # noqa: E731
    with pytest.raises(ValueError, match=one_line("'forget_me_not' needs cross-attention")):
        kinds.config(source, ["a cat"], configs, fields={"method": "forget_me_not"})
    with pytest.raises(ValueError, match=r"'redirect' has no recipe [^.]*$"):
        kinds.config(source, ["a cat"], configs, fields={"method": "redirect"})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_recipe_for_the_embedded_model(method):
    for concept in ("neon style", "a cat"):
        assert kinds.config("emoji", [concept], dict, fields={"method": method}) in recipe.config_names()


def test_a_method_without_a_recipe_names_those_that_have_one_and_the_way_without(tmp_path, monkeypatch):
    known = [name for name in recipe.config_names() if name not in ("emoji_sdd", "emoji_uce", "uce")]
    monkeypatch.setattr(kinds, "config_names", lambda: known)
    others = ", ".join(name for name in METHODS if name not in ("sdd", "uce"))
    expected = one_line(
        "method 'sdd'", "emoji", "kind='style'", f"have one: {others})", "recipe.preset('sdd')", "my.py"
    )
    with pytest.raises(ValueError, match=expected):
        parsed("neon style", "--method=sdd")
    with pytest.raises(ValueError, match=expected):
        api.planned("emoji", "neon style", method="sdd")
    with pytest.raises(ValueError, match=one_line("method 'uce'", "x/y", "kind='person'", "preset('uce')")):
        kinds.config("x/y", ["Ada"], lambda: api.architecture("sd14")[0], kind="person", fields={"method": "uce"})
    file = tmp_path / "my.py"  # what the message says
    file.write_text("from esd_jax import recipe\nget_config = lambda: recipe.preset('sdd')\n")
    plan = api.planned("emoji", "neon style", config=str(file))
    assert (plan.method, plan.base) == ("sdd", "emoji")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"drawing_sampler": "dpmpp_2m"}, "drawing_sampler='dpmpp_2m' is not implemented along the rectified flow path"),
     ({"drawing_steps": 2000}, "drawing_steps must be in 1..1000")],
)  # fmt: skip
def test_a_plan_refuses_images_that_cannot_be_drawn(fields, expected):
    settings = recipe.preset("ablating", "flow", concept="a cat", replace_with="a pet", **fields)
    source = setup.Shapes(*api.architecture("emoji-flow"))
    with pytest.raises(ValueError, match=one_line(expected)):
        setup.assemble(source, recipe.make(**settings))
    drawn = dataclasses.replace(METHODS["ablating"](), drawing_sampler="dpmpp_2m")
    setup.check_drawing(drawn, api.architecture("emoji")[1])


def test_words_that_leave_no_doubt():
    assert kinds.kind_of("x/y", ["Nudity"]) == kinds.kind_of("emoji", ["a naked man"]) == "nudity"
    assert kinds.kind_of("x/y", ["cubist style"]) == "style" and kinds.kind_of("x/y", ["a cat"]) is None
    assert kinds.kind_of("emoji", ["a cat"]) == kinds.kind_of("emoji", ["a unicorn"]) == "object"
    assert kinds.kind_of("emoji", ["neon"]) == "style" and kinds.kind_of("emoji", []) is None


def test_every_field_is_described():
    described = recipe_docs.described()
    assert {one.name for one in described} == set(recipe.field_types())
    assert not [one.name for one in described if not one.text]
    eta = next(one for one in described if (one.method, one.name) == ("esd", "eta"))
    assert (eta.kind, eta.default) == ("number", 1.0) and eta.text.startswith("strength.")
    assert {one.method for one in described} == {"", *METHODS}


def test_the_table_of_fields_is_as_the_code_says():
    """`python -m esd_jax.recipe_docs > docs/fields.md` makes it."""
    assert (ROOT / "docs" / "fields.md").read_text() == recipe_docs.markdown()


def test_templates_of_previews():
    plan = recipe.make(concept="Monet; Dali", preview_prompts="a painting by {}; a cat; Monet")
    assert plan.previews == ("a painting by Monet", "a painting by Dali", "a cat", "Monet")
    assert recipe.make(concept="Monet").previews == ("Monet",)
    for name in recipe.config_names():
        config = recipe.read(name)
        if texts := config.get("preview_prompts"):
            assert "{}" in texts or name.endswith("_nudity")


def test_a_concept_that_the_embedded_model_does_not_know_is_doubted():
    base = esd_jax.load("emoji")
    assert examples.doubt(base, ["a cat"]) == examples.doubt(base, ["neon style"]) == ""
    assert examples.doubt(base, ["a kat"]).startswith("the embedded model does not know 'a kat': choose a style (")
    elsewhere = dataclasses.replace(base, provenance=dataclasses.replace(base.provenance, source="org/model"))
    assert examples.doubt(elsewhere, ["a kat"]) == ""
