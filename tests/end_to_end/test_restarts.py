"""STEREO in a run's folder: stopped and resumed in either stage, in half precision, and as a LoRA."""

import json
from typing import Any

import factories
import numpy as np
import pytest
from messages import one_line

import esd_jax
from esd_jax.training.loop import Stopped

pytestmark = pytest.mark.slow
STEREO: dict[str, Any] = {
    "config": "stereo", "subset": "esd-x", "search_rounds": 2, "search_updates": 2, "steps": 6, "inversion_steps": 2,
    "inversion_tokens": "<rand-1>", "contexts": "a photo of the {}: a photo", "template": "a photo of {concept}",
    "drawn_images": 2, "drawing_steps": 2, "sampling_steps": 4, "learning_rate": 1e-3, "checkpoint_every": 1,
    "preview_prompts": "{}",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    factories.make_sd1(folder := tmp_path_factory.mktemp("base"))
    return folder


def furthest(base, erased):
    return max(np.abs(value - np.asarray(base.params["unet"][name.removeprefix("unet/")], np.float32)).max()
               for name, value in erased.edits.items())  # fmt: skip


@pytest.mark.parametrize(
    "fields", [{"dtype": "float32", "hold": 0.5}, {"dtype": "bfloat16"}, {"dtype": "float32", "rank": 2}]
)
def test_a_run_that_is_stopped_in_any_stage_is_the_same_to_the_bit(folder, tmp_path, fields):
    options = STEREO | fields
    whole = esd_jax.erase(folder, ["cat", "dog"], output_dir=tmp_path / "whole", **options)
    for stop in (1, 3):  # the host runs two updates ahead
        place = tmp_path / f"stopped{stop}"

        def at(number, metrics, stop=stop):
            return number == stop

        with pytest.raises(Stopped):
            esd_jax.erase(folder, ["cat", "dog"], output_dir=place, on_step=at, **options)
        resumed = esd_jax.erase(folder, ["cat", "dog"], output_dir=place, resume=True, **options)
        for name, value in whole.edits.items():
            np.testing.assert_array_equal(resumed.edits[name], value)
        records = [one.provenance.erased[-1].rounds for one in (whole, resumed)]
        assert records[0] == records[1] and [(r["step"], r["round"]) for r in records[0]] == [(2, 1), (4, 2)]
    lines = (tmp_path / "whole" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_the_second_stage_begins_at_the_weights_of_the_base(folder):
    base = esd_jax.load(folder, dtype="float32")
    options = {**STEREO, "optimizer": "adam", "weight_decay": 0.0, "search_pace": 100.0, "dtype": "float32"}
    erased = esd_jax.erase(base, "cat", **options)
    assert 1e-3 < furthest(base, erased) < 2.01e-3  # two updates
    with pytest.raises(ValueError, match=one_line("'stereo' restarts", "leave start_from out")):
        esd_jax.erase(base, "cat", start_from=erased, **options)
