"""An erased model as a technique of eval-unlearn, and our figures as a report of its format.

The package is found by its entry point: with both installed, `eval-unlearn plugins` lists `esd_jax`, and a run's config
names it:

    {"technique": {"name": "esd_jax", "config": {"run": "runs/van_gogh", "erase_concept": "Van Gogh"}},
     "metric": {"name": "ua_ira", "config": {...}}}
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from esd_jax import loading, results
from esd_jax.erasure import texts_of
from esd_jax.evaluation import testbed
from esd_jax.evaluation.drawing import sampled
from esd_jax.evaluation.evidence import Evidence, Finding
from esd_jax.io.exact import with_strength
from esd_jax.sampling import sample

NAME = "esd_jax"
SEEDS = 2**32


class Technique:
    """What eval-unlearn makes of the technique's config, and asks for images.

    run: what `esd_jax.load` opens: a run's folder, an exported checkpoint, a delta or LoRA with its base.
    base: what the latter were erased from.
    erase_concept: names the concept in eval-unlearn's reports; by default what the record of the erasure says.
    strength: the part of the change that is applied, 1 for all of it.
    num_inference_steps, guidance_scale: by default those that the model was tuned for, or its family's.
    batch_size: images per call of the network. dtype: the compute dtype.

    Fields that it does not know are passed over, as eval-unlearn's own techniques do.
    """

    def __init__(
        self,
        run: str,
        base: str | None = None,
        erase_concept: str | None = None,
        strength: float = 1.0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 8,
        dtype: str | None = None,
        **_: Any,
    ):
        erased = loading.load(run, base=base, dtype=dtype)
        self.model = erased if strength == 1 else with_strength(erased, strength)
        self.erase_concept = erase_concept or ", ".join(texts_of(erased.provenance.erased))
        bed = testbed.of(erased.provenance.source)
        asked = {"steps": num_inference_steps, "guidance_scale": guidance_scale, "batch_size": batch_size}
        self._options = (sampled(bed.sampling) if bed else {}) | {k: v for k, v in asked.items() if v is not None}

    def generate(self, prompts: Sequence[str], seed: int | None = None, **options: Any) -> list[Image.Image]:
        """One image of each prompt.

        Args:
          seed: image i is of seed + i, as of eval-unlearn's own techniques; None: of the time of day.
          **options: num_inference_steps and guidance_scale in place of the config's; others are passed over.
        """
        first = time.time_ns() if seed is None else seed
        names = {"num_inference_steps": "steps", "guidance_scale": "guidance_scale"}
        asked = {ours: options[theirs] for theirs, ours in names.items() if options.get(theirs) is not None}
        seeds = [(first + i) % SEEDS for i in range(len(prompts))]
        images = sample(self.model, list(prompts), seed=seeds, sampler="auto", **(self._options | asked))
        return [Image.fromarray(image) for image in images]


def report(evidence: Evidence, when: float | None = None) -> dict[str, Any]:
    """The findings of an erasure in the format of eval-unlearn's reports of several metrics.

    Args:
      evidence: with a verdict. when: seconds since 1970, by default now.

    Raises ValueError for evidence without figures.
    """
    if not evidence.verdict:
        raise ValueError("nothing was measured yet: run `esd-jax evaluate RUN` first")
    metrics = [_metric(finding) for finding in evidence.verdict]
    timestamp = time.time() if when is None else when
    described = json.loads(json.dumps(dict(evidence.measured_with), default=str))
    return {
        "run_id": hashlib.sha256(json.dumps([described, metrics], sort_keys=True).encode()).hexdigest()[:8],
        "timestamp": timestamp,
        "technique_name": NAME,
        "erase_concept": evidence.title,
        "metric_names": [metric["name"] for metric in metrics],
        "metric_results": {metric["name"]: metric for metric in metrics},
        "measured_with": described,
    }


def write(evidence: Evidence, path: Path) -> Path:
    """Writes `report` to a file. Returns the file."""
    with results.replacing(path) as partial:
        partial.write_text(json.dumps(report(evidence), indent=4) + "\n", encoding="utf-8")
    return path


def _metric(finding: Finding) -> Mapping[str, Any]:
    """A finding as eval-unlearn's MetricResult: its name, its value, and details."""
    after, before, chance = finding.after, finding.before, finding.control
    details = {"role": finding.role, "low": after.low, "high": after.high, "images": after.n, "share": finding.percent}
    details |= {"base": before.value if before else None, "control": chance.value if chance else None}
    return {"name": f"{finding.role}: {finding.what}", "value": after.value, "details": details}
