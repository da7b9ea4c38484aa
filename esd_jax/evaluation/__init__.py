"""The evaluation of an erasure: images, measurements, attacks, and the report.

    from esd_jax import erase, evaluate, evaluation

    evidence = evaluate(base, erased, "quick", output_dir="evidence")
    print(evaluation.text.summary(evidence))

    detect, name = evaluation.detector("probe", "neon style")
    question = evaluation.Question(("a cat in neon style", "a fox in neon style"), detect, name)
    erased = erase(base, "neon style", stop_when=evaluation.below(question, 0.05))

Detectors and metric models bring their libraries with them: they are imported on first use.
"""

from typing import TYPE_CHECKING

from esd_jax import lazy

if TYPE_CHECKING:
    from esd_jax.evaluation import gather, prompts, protocols, seen, testbed, tiers
    from esd_jax.evaluation.evidence import Evidence, Finding, Table
    from esd_jax.evaluation.judges import detectors, lpips
    from esd_jax.evaluation.measures import MEASURES
    from esd_jax.evaluation.protocols import PROTOCOLS, Protocol
    from esd_jax.evaluation.report import layers, text
    from esd_jax.evaluation.seen import Question, below, detector

__all__ = [
    "MEASURES",
    "PROTOCOLS",
    "Evidence",
    "Finding",
    "Protocol",
    "Question",
    "Table",
    "below",
    "detector",
    "detectors",
    "gather",
    "layers",
    "lpips",
    "prompts",
    "protocols",
    "seen",
    "testbed",
    "text",
    "tiers",
]
_PLACES = {
    **dict.fromkeys(("Evidence", "Finding", "Table"), "esd_jax.evaluation.evidence"),
    "MEASURES": "esd_jax.evaluation.measures",
    **dict.fromkeys(("PROTOCOLS", "Protocol"), "esd_jax.evaluation.protocols"),
    **dict.fromkeys(("Question", "below", "detector"), "esd_jax.evaluation.seen"),
    **{name: f"esd_jax.evaluation.{name}" for name in ("gather", "prompts", "protocols", "seen", "testbed", "tiers")},
    **{name: f"esd_jax.evaluation.judges.{name}" for name in ("detectors", "lpips")},
    **{name: f"esd_jax.evaluation.report.{name}" for name in ("layers", "text")},
}
if not TYPE_CHECKING:  # detectors and metric models bring libraries with them, imported where one is asked for
    __getattr__, __dir__ = lazy.names(__name__, _PLACES)
