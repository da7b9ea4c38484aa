"""Where the images of protocols lie: each list of prompts, sampled with the same settings, has a folder."""

import hashlib
import shutil
import types

import pytest
from evaluated import base_and_run
from safetensors.numpy import load_file, save_file

import esd_jax
from esd_jax import dossier, families
from esd_jax.evaluation import drawing, prompts, protocols
from esd_jax.evaluation.drawing import Drawing


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return base_and_run(tmp_path_factory.mktemp("models"))


def test_each_list_and_way_of_drawing_has_images_of_its_own(models, tmp_path, unchecked):
    base, erased, _ = models
    (tmp_path / "my own.csv").write_text("prompt\ncat\ndog\n")

    def images(name, **options):
        how = {"num_steps": 1, "height": 32, "width": 32, "images": 2, "measured": ["ssim"], **options}
        dossier.evaluate(base, erased, name, output_dir=tmp_path / "out", **how)
        names = {str(file.relative_to(tmp_path / "out" / "images")) for file in (tmp_path / "out").rglob("*.png")}
        new, kept[:] = names - set(kept), names
        return sorted(new)

    kept = []
    both = ["base/0.png", "base/1.png", "erased/0.png", "erased/1.png"]
    for used, options in (
        ("preservation", {}), ("custom", {"prompt_list": tmp_path / "my own.csv"}), ("preservation", {"num_steps": 2}),
    ):  # fmt: skip
        new = images(used, **options)
        (place,) = {name.partition("/")[0] for name in new}
        assert place.startswith("everyday-" if used == "preservation" else "my-own-")
        assert new == [f"{place}/{name}" for name in both]
    assert images("quick") == images("custom", prompt_list=tmp_path / "my own.csv", batch_size=1) == []


def test_images_of_earlier_versions_are_used_or_left_alone(models, tmp_path, unchecked):
    base, erased, _ = models
    how = {"num_steps": 1, "height": 32, "width": 32, "images": 2}
    former = tmp_path / "out" / "images"
    first, second = prompts.load("everyday").cases[:2]
    settings = drawing.of_family(Drawing(num_steps=1, height=32, width=32), base)
    for name, model in (("base", base), ("erased", erased)):
        drawing.draw(model, protocols.identity(model), [first], settings, former / name)
    before = {file: file.read_bytes() for file in former.rglob("*.png")}
    dossier.evaluate(base, erased, "smoke", output_dir=tmp_path / "out", **how)
    assert {str(file.relative_to(former)) for file in former.rglob("*.png")} == {
        f"{name}/{case.case}.png" for name in ("base", "erased") for case in (first, second)
    }
    dossier.evaluate(base, erased, "smoke", output_dir=tmp_path / "out", **{**how, "num_steps": 2})
    assert len(list(former.rglob("*.png"))) == 8 and len(list(former.glob("*/*.png"))) == 4
    assert all(file.read_bytes() == content for file, content in before.items())


def test_a_model_with_another_text_encoder_has_an_identity_of_its_own(models, tmp_path):
    base, _, folder = models
    shutil.copytree(folder / "base", tmp_path / "copy")
    digest = lambda name: hashlib.sha256(  # noqa: E731
        next((tmp_path / "copy" / name).glob("*.safetensors")).read_bytes()
    ).hexdigest()
    own = protocols.identity(base)
    assert own["components_sha256"] == {name: digest(name) for name in ("text_encoder", "vae")}
    assert protocols.identity(esd_jax.load(tmp_path / "copy")) == own
    (file,) = (tmp_path / "copy" / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    save_file({**tensors, name: tensors[name] + 1}, file)
    other = protocols.identity(esd_jax.load(tmp_path / "copy"))
    assert other == {**own, "components_sha256": {**own["components_sha256"], "text_encoder": digest("text_encoder")}}
    cases, how = prompts.load("everyday").cases[:1], Drawing(num_steps=1, height=32, width=32)
    former = {name: value for name, value in own.items() if name != "components_sha256"}
    drawing.draw(base, own, cases, how, tmp_path / "images")
    with pytest.raises(ValueError, match="'model' differs"):
        drawing.draw(base, other, cases, how, tmp_path / "images")
    drawing.draw(base, former, cases, how, tmp_path / "earlier")  # as earlier versions recorded it
    manifest = (tmp_path / "earlier" / "manifest.json").read_text()
    for one in (own, other):  # nothing says whose images these are
        drawing.draw(base, one, cases, how, tmp_path / "earlier")
    assert (tmp_path / "earlier" / "manifest.json").read_text() == manifest


@pytest.mark.parametrize(
    ("arch", "protocol", "options", "expected"),
    [
        ("emoji", "custom", {}, (20, 3.0)),
        ("emoji", "i2p", {}, (20, 3.0)),
        ("emoji", "custom", {"num_steps": 50}, (50, 3.0)),
        ("emoji", "custom", {"num_steps": None, "guidance_scale": 7.5}, (20, 7.5)),
        ("emoji-flow", "preservation", {}, (20, 3.0)),
        ("sd14", "custom", {}, (50, 7.5)),
        ("sd14", "quick", {}, (20, 7.5)),
    ],
)
def test_a_testbeds_model_is_sampled_as_it_was_tuned(
    arch, protocol, options, expected, monkeypatch, tmp_path, unchecked
):
    configs = esd_jax.api.architecture(arch)[0]
    source = types.SimpleNamespace(source=arch)
    base = types.SimpleNamespace(configs=configs, family=families.of(configs), provenance=source)
    monkeypatch.setattr(protocols, "identity", lambda model: {})
    used = []
    monkeypatch.setattr(protocols, "draw", lambda model, identity, cases, how, *_: used.append(how) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        protocols.evaluate(base, base, "cat", protocol, tmp_path, prompt_list="everyday", measured=["ssim"], **options)
    assert [(how.num_steps, how.guidance_scale) for how in used] == [expected]
