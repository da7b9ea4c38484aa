"""What a network says of one image, carried over to another, against the paths' definitions in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from torch_oracle import exactly

from esd_jax.diffusion.flow import CLASS, FlowSchedule
from esd_jax.diffusion.schedule import Schedule
from esd_jax.erasing.images import carried

BETAS = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_the_clean_image_stays_and_the_output_means_it_at_the_other_place(prediction):
    rng = np.random.default_rng(0)
    source, x, clean = rng.normal(size=(3, 5, 4, 4, 3))
    with exactly("float64"):
        if prediction == "flow_prediction":
            schedule = FlowSchedule.from_config({"_class_name": CLASS, "shift": 1.5})
            t = np.array([3.0, 250.5, 600.0, 850.0, 1000.0])
            sigma = t / 1000
            alpha = 1 - sigma
        else:
            schedule = Schedule.from_config(BETAS | {"prediction_type": prediction})
            t = np.array([3, 250, 600, 850, 999])
            alpha_bar = schedule.alpha_bar[t]
            alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]

        def output(at: np.ndarray) -> np.ndarray:
            """What means `clean` there, by the definition of each prediction."""
            noise = (at - alpha * clean) / sigma
            return {
                "epsilon": noise,
                "v_prediction": alpha * noise - sigma * clean,
                "sample": clean,
                "flow_prediction": noise - clean,
            }[prediction]

        actual = carried(schedule, *(jnp.asarray(a) for a in (output(source), source, x, t)))
    # 1 / sigma of t = 3 is 16 to 333: that many ulps are lost.
    np.testing.assert_allclose(np.asarray(actual), output(x), rtol=1e-9, atol=1e-9)
