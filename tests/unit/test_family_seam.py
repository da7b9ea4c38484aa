"""What the package asks of a family of one's own, and what it does with one."""

import dataclasses
from types import SimpleNamespace

import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from messages import one_line

import esd_jax
from esd_jax import families
from esd_jax.evaluation.attacks import adversary
from esd_jax.families import SD
from esd_jax.io.safetensors import file_shape, from_file, to_file
from esd_jax.params import functional, initial

OTHER = {"name": "another", "pipeline": "AnotherPipeline"}


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", list(families._FAMILIES))
    yield
    families._installed.cache_clear()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"provides": frozenset({"crossattention"})}, ["another", "'crossattention'", "'cross_attention'"]),
        ({"denoiser": "transformer"}, ["another", "lack", "'transformer'"]),
        ({"components": {"unet": {}, "text_encoder": {}}}, ["another", "lack", "'vae'"]),
        ({}, ["another", "components", "Stable Diffusion 1 and 2"]),
    ],
)
def test_what_cannot_be_a_family_is_refused(registry, fields, words):
    with pytest.raises(ValueError, match=one_line(*words)):
        families.register(dataclasses.replace(SD, **OTHER, **fields))


def test_an_installed_package_makes_its_family_known(registry, monkeypatch):
    class Other:
        pass

    components = {**SD.components, "unet": {"Other": Other}}
    mine = dataclasses.replace(SD, **OTHER, components=components, modules={**SD.modules, Other: "a module"})
    asked = []

    def points(group):
        asked.append(group)
        return [SimpleNamespace(load=lambda: mine)]

    monkeypatch.setattr(families, "entry_points", points)
    families._installed.cache_clear()
    assert families.by_pipeline({"_class_name": "AnotherPipeline"}) is mine
    assert families.module(Other()) == "a module" and "AnotherPipeline" in families.known()
    assert asked == ["esd_jax.families"]


class Table(nnx.Module):
    """A module with parameters of its own, as PixArt's blocks have."""

    def __init__(self):
        self.scale_shift_table = nnx.Param(jnp.arange(12.0).reshape(6, 2))
        self.gate = nnx.Param(jnp.ones((1, 2, 3)))
        self.proj = nnx.Linear(2, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.proj(x + self.scale_shift_table.sum(0) + self.gate[0, :, 0])


def test_a_modules_own_parameters_have_their_names_and_axes():
    network, params = functional(Table), initial(Table)
    assert network.layouts == {
        "scale_shift_table": "vector", "gate": "vector", "proj.weight": "linear", "proj.bias": "vector",
    }  # fmt: skip
    for name, value in params.items():
        written = to_file(np.asarray(value), network.layouts[name])
        assert written.shape == file_shape(value.shape, network.layouts[name])
        np.testing.assert_array_equal(from_file(written, network.layouts[name]), value)
    assert to_file(np.asarray(params["scale_shift_table"]), "vector").shape == (6, 2)
    x = jnp.array([[1.0, 2.0]])
    np.testing.assert_allclose(network.apply(params, x), Table()(x), rtol=1e-6)


def test_attacks_encode_as_the_family_does(registry, tmp_path):
    """Of a family that conditions on twice what the text encoder says."""
    factories.make_sd1(tmp_path / "base")
    doubled = lambda *inputs: jax.tree.map(lambda a: 2 * a, SD.encode(*inputs))  # noqa: E731
    families.register(dataclasses.replace(SD, encode=doubled))
    base = esd_jax.load(tmp_path / "base")
    expected = base.encode_prompts(["the cat"])
    ids = np.asarray(base.tokenizers[0](["the cat"]))
    (ours,) = adversary.conditionings(base, ids)
    np.testing.assert_allclose(ours.embeddings, expected.embeddings, atol=1e-6)
    plain = dataclasses.replace(SD, name=SD.name)
    families.register(plain)
    np.testing.assert_allclose(2 * adversary.conditionings(base, ids)[0].embeddings, expected.embeddings, atol=1e-6)
