"""What a run of a large model leaves: its change alone."""

import flow_factories
import numpy as np
import pytest
import safetensors.numpy

import esd_jax
from esd_jax import runs
from esd_jax.runs.listing import listed

FIELDS = {
    "sampler": "flow_euler", "timestep_mode": "grid", "sample_with": "teacher", "sampling_steps": 2,
    "sampling_guidance": 3.5, "subset": "flow-kv-text", "steps": 2, "learning_rate": 1e-2, "height": 16, "width": 16,
}  # fmt: skip


@pytest.mark.slow
def test_a_run_of_a_large_model_writes_its_lora(tmp_path, monkeypatch):
    """Its factors, as they were trained: no rank is lost, and no folder of the whole is written."""
    monkeypatch.setattr(runs, "LARGE", 10_000)
    flow_factories.make_flux(tmp_path / "base")
    base = esd_jax.load(tmp_path / "base")
    erased = esd_jax.erase(base, "cat", rank=2, output_dir=str(tmp_path / "run"), **FIELDS)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert runs.LORA in files and runs.MODEL not in files and not any(name.startswith("esd-") for name in files)
    lora = safetensors.numpy.load_file(tmp_path / "run" / runs.LORA)
    assert {value.shape[0] for key, value in lora.items() if "lora_A" in key} == {2}
    opened = esd_jax.load(tmp_path / "run" / runs.LORA, base=base)
    assert opened.edits.keys() == erased.edits.keys() != set()
    for name, value in erased.edits.items():
        np.testing.assert_allclose(opened.edits[name], value, rtol=1e-5, atol=1e-6)
    (run,) = listed(tmp_path)
    assert run.finished
