"""The names of methods, attacks and kinds of concepts, for checks that must not wait for JAX to be imported."""

from esd_jax import suggest
from esd_jax.config_files import config_names

# Those of `methods.METHODS`.
METHOD_NAMES = (
    "esd",
    "all_but_one",
    "sdd",
    "ablating",
    "forget_me_not",
    "stereo",
    "redirect",
    "uce",
    "rece",
    "speed",
    "oce",
)
# Those of `evaluation.attacks`: what is tried by default, what else "all" stands for, and what takes a file or a budget
# of its own.
ATTACK_NAMES = ("concept_inversion", "unlearn_diff_atk", "p4d", "ring_a_bell")
MORE_ATTACKS = (
    "concept_inversion_family", "encoder_output", "tiers", "null_inversion", "resurgence", "resurgence_lora",
    "completion", "stored_weights", "merged_lora", "composition",
)  # fmt: skip
KINDS = {
    "style": "an artist's hand, or another style",
    "object": "a thing or an animal, whether or not a prompt names it",
    "person": "a person's likeness",
    "nudity": "nudity, which prompts rarely name",
    "attribute": "what something has, there and nowhere else (with from_)",
}


def check_kind(kind: str | None, method: str | None = None) -> None:
    """Raises ValueError, with the closest known one, for an unknown kind; a method may have more of them."""
    if kind is not None and kind not in KINDS and f"{method}_{kind}" not in config_names():
        raise ValueError(f"kind={kind!r} is unknown; {suggest.did_you_mean(kind, KINDS)}")


def method_name(method: object) -> str:
    """The name of a method, whatever its case ("ESD", "all-but-one"). Raises ValueError for an unknown one."""
    if not isinstance(method, str) or not (name := suggest.same(method, METHOD_NAMES)):
        raise ValueError(unknown_method(method))
    return name


def unknown_method(method: object) -> str:
    """The message for an unknown method, with the closest known one."""
    close = suggest.closest(str(method), METHOD_NAMES)
    hint = f"did you mean {close!r}? The methods are" if close else "choose one of"
    return f"method={method!r} is unknown; {hint} {', '.join(METHOD_NAMES)}"
