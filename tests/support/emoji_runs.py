"""A run of the embedded model, and what is compared of it."""

import numpy as np

import esd_jax

HOW = {"seed": 3, "steps": 2, "guidance_scale": 3.0, "sampler": "ddim"}


def erased_run(base, tmp_path_factory):
    """A run's folder, and its erased pipeline in memory. The method is spelled as its paper does."""
    folder = tmp_path_factory.mktemp("runs") / "neon"
    return folder, esd_jax.erase(base, "neon style", method="UCE", replace_with="a drawing", output_dir=folder)


def assert_same_edits(actual, expected):
    assert actual.keys() == expected.keys() and actual
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
