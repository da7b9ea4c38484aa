"""Evidence of everything, and the pages that are made of it."""

import dataclasses
from datetime import UTC, datetime

import numpy as np
from PIL import Image

from esd_jax import recipe
from esd_jax.erasure import Erasure
from esd_jax.evaluation.evidence import Curve, Evidence, Finding, Heat, Moment, Pair, Plot, Table
from esd_jax.evaluation.report.about import About, File, Use
from esd_jax.evaluation.report.comparison import compare
from esd_jax.evaluation.report.html import report
from esd_jax.metrics.intervals import Estimate, rate

EVIL = "<script>alert('x')</script>\"&|*_`"
FILES = (
    File("model/", 18_400_000, "the erased model, a diffusers folder", "folder"),
    File("delta.safetensors", 1_060_000, "ESD delta: the trained tensors", "delta"),
    File("run.json", 1_580, "the recipe"),
)
ABOUT = About(
    "runs/neon", datetime(2026, 11, 28, 7, 8, tzinfo=UTC), 3725.0, "2 x NVIDIA H100", "apache-2.0", "org/name", FILES,
    (Use("diffusers: the model", "pipe = load()"), Use("diffusers: the delta", "load_file('x')", "A note.")),
)  # fmt: skip


def some(hits, n=20):
    return rate([True] * hits + [False] * (n - hits))


def picture(seed, size=64):
    """Smooth, as drawings are; noise would say nothing of file sizes."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def pairs(prompts, seed, size=64):
    return tuple(Pair(p, picture(seed + i, size), picture(seed + 100 + i, size)) for i, p in enumerate(prompts))


def evidence(word="neon", size=64, **changes):
    """Of everything something; `word` is wherever a user's text may be."""
    plan = recipe.make(**{**recipe.read("emoji").to_dict(), "concept": f"{word} style", "preview_prompts": word})
    record = {
        "concepts": [{"text": f"{word} style", "from_": None, "strength": 1.0}],
        "base": f"emoji {word}" if word == EVIL else "emoji",
        "base_sha256": "ab" * 32,
        "recipe": {k: v for k, v in plan.flat().items() if k != "output_dir"},
        "versions": {"esd-jax": "0.1.0", word: "1"},
        "license": "apache-2.0",
        "step": 300,
    }
    attack = ("once", "any of 5", "random prompts")
    evidence = Evidence(
        f"{word} style",
        Erasure.from_dict(record),
        measured_with={"sampler": word, "detectors": [{"name": word, "sha256": "cd" * 32}], word: {"seed": 1}},
        verdict=(
            Finding("erased", f"{word} seen", some(20), some(1)),
            Finding("kept", f"others kept, not {word}", some(19), some(18), some(17)),
            Finding("kept", f"likeness to {word}", None, Estimate(0.93, 0.91, 0.96, 20), percent=False),
            Finding("attack", f"Inversion of {word}", some(20), some(17), some(1)),
            Finding("attack", "a weaker one", some(20), some(2), some(1)),
        ),
        pictures={word: pairs([word, "a cat", "b", "c", "d", "e"], 0, size), "kept": pairs(["a dog"], 20, size)},
        tables=(
            Table(
                f"About {word}",
                ("n", f"{word} seen", "SSIM", "remark"),
                (
                    (f"prompts of {word}", ()),
                    ("base", (20, some(20), None, word)),
                    ("erased", (20, some(1), Estimate(0.13, 0.07, 0.19, 20), "")),
                ),
                f"a note on {word}",
                (f"{word} seen",),
            ),
        ),
        attacks=(Table(word, attack, (("Inversion", (some(17), some(19), some(1))),), percent=attack),),
        attack_pictures={word: pairs([word], 40, size)},
        timeline=tuple(
            Moment(100 * i, np.stack([picture(60 + i, size)] * 2), 1 - i / 3, 1 - i / 4) for i in range(4)
        ),
        timeline_prompts=(word, "a cat"),
        heat=Heat(word, ("base", word), ("ink", "pixel", word), ((1.0, 0.5, 1.0), (0.9, None, 0.05)), (word,)),
        front=Plot(word, word, f"not {word}", (
            Curve(word, (1.0, 0.2), (1.0, 0.9), (word, "1"), y_low=(0.8, 0.7), y_high=(1.0, 1.0)),
        ), percent=True),
        weights={f"unet/{name}": 0.01 * (i + 1) for i, name in enumerate(tensors(2))} | {word: 0.4},
        training=Plot(word, "update", "loss", (
            Curve(word, (1.0, 2.0), (0.5, 0.25)), Curve("b", (1.0, 2.0), (1.0, 2.0)),
        )),
        caveats=(f"{word} is only a word.",),
    )  # fmt: skip
    return dataclasses.replace(evidence, **changes)


def tensors(depth, parts=("attn2.to_q.weight", "attn2.to_k.weight", "attn2.to_v.weight", "attn2.to_out.0.weight")):
    blocks = [f"{way}_blocks.{i}" for way in ("down", "up") for i in range(depth)]
    return [f"{b}.attentions.{a}.transformer_blocks.0.{p}" for b in blocks for a in range(2) for p in parts]


PAGES = {
    "report": lambda: report(evidence(), facts=ABOUT),
    "empty": lambda: report(Evidence("neon style", Erasure(base="emoji"))),
    "hostile": lambda: report(evidence(EVIL), facts=dataclasses.replace(ABOUT, uses=(Use(EVIL, f"ls {EVIL}", EVIL),))),
    "comparison": lambda: compare([evidence(), evidence(EVIL)]),
}


def all_pages():
    return {name: make() for name, make in PAGES.items()}
