"""A base and a run that are evaluated, and evidence of every kind."""

import dataclasses

import factories
import numpy as np

import esd_jax
from esd_jax.erasure import Concept, Erasure
from esd_jax.evaluation.evidence import Curve, Evidence, Finding, Heat, Moment, Pair, Plot, Table
from esd_jax.metrics.intervals import Estimate


def base_and_run(folder):
    """A tiny base, what two steps erased from it, and the folder of both: base/ and run/."""
    factories.make_sd1(folder / "base")
    base = esd_jax.load(folder / "base")
    fields = {"steps": 2, "sampling_steps": 4, "timestep_mode": "grid", "learning_rate": 1e-2, "subset": "esd-x-strict"}
    preview = {"preview_every": 1, "preview_steps": 1, "preview_prompts": "cat;dog"}
    return base, esd_jax.erase(base, "cat", output_dir=folder / "run", **fields, **preview), folder


def whole():
    image = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    share = Estimate(0.5, 0.4, 0.6, 40)
    return Evidence(
        "neon style",
        Erasure(base="emoji", concepts=(Concept("neon style"),)),
        measured_with={"seed": 1, "detectors": [{"name": "probe"}]},
        verdict=(Finding("erased", "seen", share, share), Finding("kept", "SSIM", None, share, percent=False)),
        pictures={"a": (Pair("a cat", *image),), "b": ()},
        tables=(Table("t", ("x", "y"), (("title", ()), ("row", (share, 3))), "note", ("x",)),),
        attacks=(Table("u", ("x",), (("row", ("words",)), ("none", (None,)))),),
        attack_pictures={"p4d": (Pair("a dog", *image),)},
        timeline=(Moment(0, image), Moment(5, image, 0.5, 0.25)),
        timeline_prompts=("a cat", "a dog"),
        heat=Heat("h", ("base",), ("cat", "dog"), ((0.5, None),), ("dog",)),
        front=Plot("f", "x", "y", (Curve("c", (0.0, 1.0), (1.0, 0.5), ("0", "1")),), True),
        weights={"unet/a": 0.5},
        training=Plot("t", "x", "y", (Curve("c", (0.0,), (1.0,)),)),
        caveats=("small",),
        command="esd-jax",
    )


def same(a, b):
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b
