"""Attacks and probes on FLUX.1 [dev], whose noise schedule depends on the size of the images."""

import flow_factories
import pytest
from attacked import goal, pictures

import esd_jax
from esd_jax.diffusion.schedule import Schedule
from esd_jax.evaluation.attacks import (
    adversary,
    attack,
    concept_inversion,
    encoder_output,
    hidden,
    merged,
    null_inversion,
    preset,
)
from esd_jax.evaluation.attacks import gauge as gauges
from esd_jax.evaluation.attacks.adversary import Trial

SIZE = (16, 16)  # of the goal's images; the checkpoint's own is larger


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux") / "dev"
    flow_factories.make_flux(folder)
    return esd_jax.load(folder)


def target():
    return goal("cat", ("a cat", "the cat and the dog"))


def attacked(base, name):
    attack(base, base, target(), preset(name))


def probed(base, name, **changes):
    preset(name, **changes).probe(base, base, target(), [7])


def healed(base):
    probed(base, "resurgence", subset="flow-kv-text")


def gauged(base):
    gauges.gauge(base, base, target(), (Trial("a", base.encode_prompts(["a"]), 0),))


@pytest.mark.parametrize(
    ("module", "compiled", "measure"),
    [
        (concept_inversion, "searcher", lambda base: attacked(base, "concept_inversion")),
        (encoder_output, "searcher", lambda base: attacked(base, "encoder_output")),
        (null_inversion, "_inverter", lambda base: probed(base, "null_inversion")),
        (hidden, "healer", healed),
        (merged, "trainer", lambda base: probed(base, "merged_lora", concept="a dog", subset="flow-kv-text")),
        (gauges, "_gauger", gauged),
    ],
    ids=["concept inversion", "encoder output", "null-text inversion", "resurgence", "merged LoRA", "gauge"],
)
def test_noise_is_that_of_the_images_size(module, compiled, measure, base, monkeypatch):
    schedules = []
    monkeypatch.setattr(hidden, "benign", lambda *_, **__: (pictures(2), ["a", "b"]))
    monkeypatch.setattr(merged, "sampled_once", lambda base, texts, drawing: pictures(len(texts)))

    def stop(*args):
        schedules.extend(one for one in args if isinstance(one, Schedule))
        return 1 / 0

    monkeypatch.setattr(module, compiled, stop)
    with pytest.raises(ZeroDivisionError):
        measure(base)
    wanted = base.family.at_size(base.configs, base.schedule, SIZE)
    assert schedules == [wanted] and wanted != base.schedule
    assert adversary.schedule_of(base, adversary.latents(base, pictures(1))) == wanted
