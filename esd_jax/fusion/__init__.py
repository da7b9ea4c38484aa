"""Several erasures of one base as one: linear layers that treat each erasure's own prompts as that erasure does.

For the weight W0 [out, in] of a linear layer, of which erasure i of n made W0 + dW_i, with what the layer reads of its
own prompts, x, and of retained prompts, r (means over prompts, sums over positions),

    W = argmin  1/n sum_i E_i |W x - (W0 + dW_i) x|^2 + s E |W r - W0 r|^2 + lam |W - W0|_F^2

    (W - W0) (1/n sum_i S_i + s R + lam 1) = 1/n sum_i dW_i S_i,    S_i = E_i x x^T,  R = E r r^T

The fusion of MACE (Lu et al. 2024, arXiv 2403.06135), from its equation; there the parts are LoRAs of keys and values,
trained on attention maps, here whatever any method made of linear layers. x is a token vector for keys and values of
cross-attention; for other layers it is collected (`fusion.moments`). A sum of the changes (`io.merge`) adds what each
does to the others' prompts; training one after the other (`start_from`) lets the last forget the first.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from esd_jax import sharding, wording
from esd_jax.erasing import closed_form, contexts, corpora
from esd_jax.erasing.concepts import Concept
from esd_jax.erasing.method import Tools
from esd_jax.erasure import Erasure, Part
from esd_jax.evaluation import testbed
from esd_jax.fusion import moments
from esd_jax.fusion.moments import Moment
from esd_jax.inputs import check_finite
from esd_jax.io import merge
from esd_jax.io.diffusers import source_hash
from esd_jax.io.exact import read_each
from esd_jax.pipeline import Pipeline
from esd_jax.recipe import Recipe
from esd_jax.runs.setup import make_tools
from esd_jax.selection import select

NEEDS = frozenset({"attention_names", "classifier_free", "cross_attention"})
RETAINED = 4  # times as many samples of retained prompts as of an erasure's own


@dataclass(frozen=True)
class Fused:
    """How well the parts went together.

    texts: what each part erased. lost: of each, the part of its change's energy on its own prompts that is not there:
      |(W - W0 - dW_i) x|^2 / |dW_i x|^2, over all layers; 0 is as trained, 1 is nothing of it.
    retained: the energy of the change on what is retained, as a part of that of the changes' sum.
    """

    texts: tuple[tuple[str, ...], ...]
    lost: tuple[float, ...]
    retained: float

    def __str__(self) -> str:
        lines = [f"fused {len(self.texts)} erasures; of each, lost on its own prompts:"]
        lines += [f"  {lost:6.1%}  {', '.join(texts)}" for texts, lost in zip(self.texts, self.lost, strict=True)]
        return "\n".join([*lines, f"effect on retained prompts: {self.retained:.1%} of that of the changes' sum"])


def fuse(
    base: Pipeline,
    parts: Sequence[Pipeline],
    *,
    retain: str | None = None,
    preserve_scale: float = 1.0,
    lam: float = 0.01,
    samples: int = 64,
    seed: int = 0,
) -> tuple[Pipeline, Fused]:
    """The base with the fusion of several erasures' linear layers.

    Args:
      base: as its files have it.
      parts: erased pipelines of the same base, whose records say what was erased, and in which contexts.
      retain: the corpus that is retained, without what any part erased: "emoji", "general", or a .txt or .csv file (as
        UCE's `retain`); by default that of the base. With it goes what the parts preserve, but for prompts that name
        what any of them erased. A part's own prompts are its concepts alone and in its contexts, and the corpus's
        prompts that hold them.
      preserve_scale: s of the module's docstring. lam: how hard the weights are held to the base's.
      samples: of each erasure's prompts, and four times as many of the retained ones, from which inputs of layers other
        than keys and values are collected. seed: of these.

    Returns:
      the fused pipeline, with the records of all parts; and how well they went together.

    Raises ValueError for no parts; one that is there twice, changes more than linear layers, is of another base, or
    does not say what it erased; a base with edits or without keys and values of token vectors; a number out of range.
    """
    check_finite(preserve_scale=preserve_scale, lam=lam)
    if not parts:
        raise ValueError("there is nothing to fuse: give at least one erasure")
    if lam <= 0 or preserve_scale < 0:
        raise ValueError(f"lam={lam} must be positive, and preserve_scale={preserve_scale} at least 0")
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    if base.edits:
        raise ValueError("the base of a fusion has edits: export and load it")
    base.family.require(NEEDS, "fusing")
    bed = testbed.of(base.provenance.source)
    retain = retain or (bed.corpus if bed else "general")
    changes = [_changed(base, part) for part in parts]
    concepts = [_concepts(base, part) for part in parts]
    for i, change in enumerate(changes):
        if any(_equal(change, other) for other in changes[:i]):
            texts = ", ".join(repr(concept.text) for concept in concepts[i][0])
            raise ValueError(f"the erasure of {texts} is there twice: name each one once")
    layers, net = moments.layers_of(changes), base.network(base.denoiser)
    shapes = {f"{base.denoiser}/{name}": shape for name, shape in net.shapes.items()}
    matrices = [moments.joined(change, layers, shapes) for change in changes]
    everything = [concept for of_part, _ in concepts for concept in of_part]
    tools = make_tools(base, Recipe(), sharding.make_mesh(1))
    kept = corpora.retained(retain, everything, ["", *_preserved(everything)], tools.tokens)
    own = [_prompts(retain, *one, tools.tokens) for one in concepts]
    read = partial(_read, base, tools, layers)
    of_own = [read(part, prompts, samples, seed + i) for i, (part, prompts) in enumerate(zip(parts, own, strict=True))]
    of_kept = read(base, kept, RETAINED * samples, seed + len(parts))
    fused, lost, retained = solve(matrices, of_own, of_kept, preserve_scale, lam)
    new = moments.parted(fused, layers)
    edits = {
        name: (np.asarray(first, np.float64) + new[name]).astype(np.float32) for name, first in read_each(base, new)
    }
    settings = {"retain": retain, "preserve_scale": preserve_scale, "lam": lam}
    records = tuple(Part(1.0, part.provenance.erased[len(base.provenance.erased) :]) for part in parts)
    texts = tuple(tuple(concept.text for concept in of_part) for of_part, _ in concepts)
    return base.with_edits(edits, Erasure(merged=records, others={"fused": settings})), Fused(texts, lost, retained)


def _read(
    base: Pipeline,
    tools: Tools,
    layers: Mapping[str, bool],
    network: Pipeline,
    prompts: Mapping[str, float],
    samples: int,
    seed: int,
) -> dict[str, Moment]:
    """The moment of what each layer of a network reads of some prompts: its own activations, at x_t of the base."""
    token, net = _keys_and_values(base), base.network(base.denoiser)
    others = {name: bias for name, bias in layers.items() if bias or name not in token}
    read: dict[str, Moment] = {}
    if others.keys() != layers.keys():
        of_tokens = corpora.moment(tools, prompts)
        read |= {name: of_tokens for name in layers if name not in others}
    if others:
        prefix, of_base = f"{base.denoiser}/", base.params[base.denoiser]
        where = moments.points(tools, of_base, prompts, samples, seed)
        bare = {name.removeprefix(prefix): bias for name, bias in others.items()}
        collected = moments.collected(net, network.params[base.denoiser], bare, where)
        read |= {f"{prefix}{name}": moment for name, moment in collected.items()}
    return read


def solve(
    changes: Sequence[Mapping[str, np.ndarray]],
    own: Sequence[Mapping[str, Moment]],
    kept: Mapping[str, Moment],
    preserve_scale: float,
    lam: float,
) -> tuple[dict[str, np.ndarray], tuple[float, ...], float]:
    """The change of each kernel [inputs, outputs], what is lost of each part, and `Fused.retained`; in float64.

    changes: of each part, those of its layers. own, kept: of each layer, S_i and R of the module's docstring.
    """
    fused: dict[str, np.ndarray] = {}
    missing, whole, energy, of_sum = np.zeros(len(own)), np.zeros(len(own)), 0.0, 0.0
    for name in sorted({name for one in changes for name in one}):
        blank = np.zeros_like(next(one[name] for one in changes if name in one))
        parts, of_own = [one.get(name, blank) for one in changes], [one[name] for one in own]
        matrix = np.mean(of_own, axis=0) + preserve_scale * kept[name] + lam * np.eye(len(blank))
        right = np.mean([moment @ part for moment, part in zip(of_own, parts, strict=True)], axis=0)
        fused[name] = np.linalg.solve(matrix, right)
        for i, (moment, part) in enumerate(zip(of_own, parts, strict=True)):
            missing[i] += _energy(fused[name] - part, moment)
            whole[i] += _energy(part, moment)
        energy += _energy(fused[name], kept[name])
        of_sum += _energy(np.sum(parts, axis=0), kept[name])
    lost = tuple(float(m / w) if w > 0 else 0.0 for m, w in zip(missing, whole, strict=True))
    return fused, lost, float(energy / of_sum) if of_sum > 0 else 0.0


def _energy(change: Any, moment: Moment) -> float:
    """The mean square of what a change of a kernel [context, out] does to the vectors of a second moment."""
    return float(np.sum(change * (moment @ change)))


def _keys_and_values(base: Pipeline) -> set[str]:
    """The kernels that read token vectors."""
    net = base.network(base.denoiser)
    return {f"{base.denoiser}/{name}" for name in select(closed_form.SUBSET, net.layouts, base.family.subsets)}


def _changed(base: Pipeline, part: Pipeline) -> dict[str, np.ndarray]:
    """What a part changed. Raises ValueError if it is more than linear layers of the denoiser."""
    changed = merge.change(base, part, 1.0, source_hash(base), False)
    if name := _other_layer(base, changed):
        raise ValueError(
            f"{part.provenance.source} changes {name!r}, which is no linear layer of the denoiser: what is to "
            f"be fused is trained with a subset of these, such as {closed_form.SUBSET!r} or 'to_out'"
        )
    return changed


def _other_layer(base: Pipeline, names: Iterable[str]) -> str | None:
    """The first of some tensors that is none of a linear layer of the denoiser."""
    layouts, prefix = base.network(base.denoiser).layouts, f"{base.denoiser}/"
    kernels = ((name, moments.kernel_of(name).removeprefix(prefix)) for name in sorted(names))
    return next((name for name, kernel in kernels if layouts.get(kernel) != "linear"), None)


def can_fuse(erased: Pipeline) -> bool:
    """Whether `fuse` takes an erasure: its family has what that needs, and it changes linear layers alone."""
    return not erased.family.lacks(NEEDS, "fusing") and _other_layer(erased, erased.edits) is None


def _equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Whether two parts change the same tensors by the same."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def _preserved(concepts: Sequence[Concept]) -> list[str]:
    """What any of the parts preserves, without the prompts that name what another one erased."""
    texts = closed_form.preserved(concepts)
    return [text for text in texts if not any(wording.names(concept.erased_from, text) for concept in concepts)]


def _concepts(base: Pipeline, part: Pipeline) -> tuple[list[Concept], str | None]:
    """What a part erased, and its contexts, by its records. Raises ValueError if they do not say."""

    def within(records: Sequence[Erasure]) -> list[Erasure]:
        return [one for record in records for one in (*within(record.inner), record)]

    records = within(part.provenance.erased[len(base.provenance.erased) :])
    concepts = list({concept.erased_from: concept for record in records for concept in record.concepts}.values())
    if not concepts:
        raise ValueError(f"{part.provenance.source} has no record of what was erased, so nobody knows its prompts")
    sentences = [str(text) for record in records if (text := (record.recipe or {}).get("contexts"))]
    return concepts, " | ".join(sentences) or None


def _prompts(retain: str, concepts: Sequence[Concept], sentences: str | None, tokens: Any) -> dict[str, float]:
    """The prompts that a part is to be read from as it was trained: prompt -> weight, as in the corpus."""
    weights = corpora.prompts(retain)
    left = set(corpora.without(list(weights), [concept.text for concept in concepts]))
    holding = {text: weight for text, weight in weights.items() if text not in left}
    average = sum(holding.values()) / len(holding) if holding else 1.0
    parsed = contexts.parse(sentences)
    texts = [concept.erased_from for concept in concepts]
    texts += [context.prompt.replace(contexts.NAME, concept.text) for concept in concepts for context in parsed]
    return {**dict.fromkeys(texts, average), **corpora.cut(holding, tokens)}
