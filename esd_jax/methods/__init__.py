"""The erasing methods, one paper per file: frozen dataclasses of settings that make an `erasing.method.Method`."""

from esd_jax.erasing.method import Settings
from esd_jax.methods.ablating import Ablating
from esd_jax.methods.all_but_one import AllButOne
from esd_jax.methods.esd import ESD
from esd_jax.methods.forget_me_not import ForgetMeNot
from esd_jax.methods.oce import OCE
from esd_jax.methods.rece import RECE
from esd_jax.methods.redirect import Redirect
from esd_jax.methods.sdd import SDD
from esd_jax.methods.speed import SPEED
from esd_jax.methods.stereo import STEREO
from esd_jax.methods.uce import UCE

# `needs` and `ema` are attributes of some of these classes, fields or properties of others.
METHODS: dict[str, type[Settings]] = {  # pyright: ignore[reportAssignmentType]
    "esd": ESD,
    "all_but_one": AllButOne,
    "sdd": SDD,
    "ablating": Ablating,
    "forget_me_not": ForgetMeNot,
    "stereo": STEREO,
    "redirect": Redirect,
    "uce": UCE,
    "rece": RECE,
    "speed": SPEED,
    "oce": OCE,
}
