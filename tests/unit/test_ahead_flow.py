"""A step of FLUX.1 and SD 3 compiled from shapes, and how near to it the plan is."""

import importlib.util

import pytest

from esd_jax.planning.plan import STEP, make_plan
from launch.benchmarks import child, work

SMALL = {"height": 256, "width": 256}


def test_recomputing_is_planned_to_need_less():
    configs, schedule = work.architecture("tiny-flux")
    kept, again = (
        make_plan(configs, schedule, work.plan("tiny-flux", "flow-text", 1, "float32", remat=remat, **SMALL))
        for remat in (False, True)
    )
    assert again.memory[STEP] < kept.memory[STEP]


def test_an_architecture_with_fewer_blocks():
    (flux, _), (sd3, _) = work.architecture("flux-dev:4+8"), work.architecture("sd35-medium:15")
    (whole, _), (medium, _) = work.architecture("flux-dev"), work.architecture("sd35-medium")
    assert (flux["transformer"].num_layers, flux["transformer"].num_single_layers) == (4, 8)
    assert flux["transformer"].width == whole["transformer"].width == 3072
    assert sd3["transformer"].num_layers == 15
    assert sd3["transformer"].dual_attention_layers == medium["transformer"].dual_attention_layers
    assert work.architecture("sd35-medium:6")[0]["transformer"].dual_attention_layers == tuple(range(6))
    assert work.plan("sd35-medium:6", "flow-text", 1).remat  # as the whole does, for its size
    for wrong in ("flux-dev:4", "flux-dev:20+8", "flux-dev:4+39", "flux-dev:four+8", "sd35-medium:25", "sd14:2"):
        with pytest.raises(ValueError, match="are no blocks of this architecture: give flux-dev:4"):
            work.architecture(wrong)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'esd-jax[tpu]'")
def test_the_plan_is_near_what_a_flow_needs_on_a_tpu():
    """A LoRA of SD 3, on four chips, of which each sends the gradient of the factors and nothing else but scalars."""
    options = {"arch": "tiny-sd3", "method": "flow-text", "rank": 16, "batch_size": 0, "topology": "v5e:2x2"}
    result = child.result("compile", child.tpu_environment(), **options, dtype="bfloat16")
    assert "error" not in result, result["error"]
    assert result["planned"] == pytest.approx(result["peak"], rel=0.1)
    assert {(c["kind"], c["inside"]) for c in result["collectives"]} == {("all-reduce", False)}
    assert sum(c["bytes"] for c in result["collectives"]) == pytest.approx(result["gradient"], rel=0.01)
