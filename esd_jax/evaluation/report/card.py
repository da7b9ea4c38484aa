"""An erasure in Markdown, for model hubs; as flat texts, for the metadata of files; as the line that repeats it."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from esd_jax.erasure import Erasure
from esd_jax.evaluation.evidence import ROLES, Cell, Evidence, Finding, Table, as_json
from esd_jax.evaluation.report import rounds, snippets, terms, verdict
from esd_jax.evaluation.report.about import About
from esd_jax.evaluation.report.numbers import count, value, with_interval
from esd_jax.io.folder import read_records
from esd_jax.io.safetensors import Header

# Fields of a recipe that change nothing of the result.
NOT_COMPUTED = {
    "log_every", "checkpoint_every", "keep_checkpoints", "tensorboard", "preview_every", "preview_prompts",
    "preview_steps", "preview_guidance", "output_dir",
}  # fmt: skip
FIRST = ("base", "concept", "method", "subset")  # of the fields, in the line that repeats an erasure
METADATA = "esd_jax."  # what the names of `facts` begin with; those of formats begin with it, too ("esd_jax.kind")
STRENGTH = METADATA + "strength"  # of a file that has another part of the change than all of it
FACTS = (
    "erased", "base", "base_sha256", "method", "subset", "steps", "seed", "license", "command", "versions",
    "measured_with", "measured", "attacked", "caveats", "verdict",
)  # fmt: skip
TAGS = ("stable-diffusion", "text-to-image", "concept-erasure", "machine-unlearning", "esd-jax")
NOT_MEASURED = "Nothing was measured."
UNKNOWN_LICENSE = ("other", "that-of-the-base")  # license and license_name of a base whose licence is not known


def command(record: Erasure, *, config: str | None = None, known: Mapping[str, Any] | None = None) -> str:
    """The line that repeats an erasure.

    Every field that shapes the result is spelled out, so the line does not depend on what a config says today. A base
    or image that was a file is named without its folder, as the record has it.

    Args:
      record: of the erasure. The line is empty if it has no recipe, or one that no flags can give.
      config: the config to start from; by default the method's.
      known: the config's own fields: what equals them is left out.
    """
    recipe = dict(record.recipe or {})
    if not recipe or record.started_from or any(isinstance(setting, list | tuple) for setting in recipe.values()):
        return ""  # texts that hold a separator can be given in Python alone
    known, method = dict(known or {}), str(recipe.get("method", "esd"))
    if config is None:
        config = "esd_x" if method == "esd" else method
    names = [name for name in FIRST if name in recipe] + [name for name in recipe if name not in FIRST]
    words = ["esd-jax erase", f"--config={shlex.quote(config)}"]
    for name in names:
        setting = recipe[name]
        # None is what a field has that no flag sets.
        if name in NOT_COMPUTED or setting is None or (name in known and known[name] == setting):
            continue
        words.append(f"--config.{name}={shlex.quote(str(setting))}")
    return " ".join([*words, "--config.output_dir=runs/again"])


def facts(evidence: Evidence) -> dict[str, str]:
    """What is known of an erasure as flat texts, for the metadata of a safetensors file."""
    evidence, record = terms.current(evidence), evidence.record
    recipe = record.recipe or {}
    texts = {"erased": evidence.title, "base": record.base, "base_sha256": record.base_sha256}
    texts |= {name: recipe.get(name) for name in ("method", "subset", "steps", "seed")}
    texts |= {"license": record.license, "command": evidence.command or command(record)}
    texts |= {"versions": ", ".join(f"{name} {v}" for name, v in (record.versions or {}).items())}
    for i, finding in enumerate(evidence.verdict, start=1):
        texts[f"finding.{i}"] = f"{finding.role}: {sentence(finding)}"
    if evidence.measured_with:
        texts["measured_with"] = json.dumps(as_json(evidence.measured_with), default=str)
    texts["measured"] = "yes" if evidence.verdict or evidence.tables else "no"
    texts["attacked"] = "yes" if evidence.attacks or any(f.role == "attack" for f in evidence.verdict) else "no"
    texts["verdict"] = verdict.sentence(evidence) if evidence.verdict else ""
    texts["caveats"] = " ".join(evidence.caveats)
    return {METADATA + name: str(text) for name, text in texts.items() if text not in (None, "")}


def is_fact(name: str) -> bool:
    """Whether a file's metadata have this name from `facts`."""
    bare = name.removeprefix(METADATA)
    return bare != name and (bare in FACTS or bare.startswith("finding."))


def describes(header: Header, record: Erasure) -> bool:
    """Whether a weight file has all of an erasure's change, and no other after it."""
    return STRENGTH not in header.metadata and record != Erasure() and record in read_records(header)[-1:]


def card(
    evidence: Evidence,
    *,
    picture: str | None = None,
    report: str | None = None,
    facts: About = About(),  # noqa: B008 - it is frozen
    adapter: bool = False,
) -> str:
    """The erasure card: YAML front matter and Markdown, as model hubs show it.

    Args:
      picture: file of before and after, from the card's folder. report: the HTML report's.
      facts: licence, base and code that uses the files.
      adapter: whether the files change the base, instead of holding a whole checkpoint.
    """
    evidence, record = terms.current(evidence), evidence.record
    parts = [_front(facts, record, adapter), f"# {_md(evidence.title)}, erased from {_md(record.base or 'its base')}"]
    if picture:
        parts.append(f"![Before and after, the same prompts and noise](<{picture}>)")
    parts.append(f"**{_md(verdict.sentence(evidence))}**")
    if report:
        parts.append(f"Pictures, charts and all figures: [the erasure report](<{report}>).")
    if facts.uses:
        parts.append(f"## Use it\n\n{snippets.markdown(facts.uses)}")
    parts.append(f"## Results\n\n{_key_figures(evidence.verdict) or NOT_MEASURED}")
    if evidence.verdict:
        parts.append("In brackets: 95% intervals.")
    for title, tables in (("All groups of prompts", evidence.tables), ("Attacks", evidence.attacks)):
        if tables:
            parts.append("\n\n".join([f"### {title}", *map(_table, tables)]))
    line = evidence.command or command(record)
    repeats = [f"```bash\n{line}\n```"] if line else []
    settings = {"base": record.base, "base sha256": record.base_sha256, **facts.facts, **(record.versions or {})}
    repeats.append(_list(settings))
    if (searched := rounds.table(record)) is not None:
        repeats.append(_table(searched))
    parts.append("## How it was made\n\n" + "\n\n".join(filter(None, repeats)))
    parts.append("## How it was measured\n\n" + (_list(evidence.measured_with) or NOT_MEASURED))
    parts.append("## Caveats\n\n" + ("\n".join(f"- {_md(text)}" for text in evidence.caveats) or "None were recorded."))
    return "\n\n".join(parts) + "\n"


def sentence(finding: Finding) -> str:
    """A figure of the verdict as a line, without markup."""
    if finding.role == "attack":
        text = f"{finding.what}: attack success rate {count(finding.after)} images"
        if finding.control:
            text += f"; random prompts {count(finding.control)}"
        return f"{text}; on the base {count(finding.before)}" if finding.before else text
    before = f"{value(finding.before, finding.percent)} before, " if finding.before else ""
    after = "after" if finding.before else "in the erased model"
    text = f"{finding.what}: {before}{with_interval(finding.after, finding.percent)} {after}, n = {finding.after.n:,}"
    if finding.control:
        text += f"; reseeded baseline {with_interval(finding.control, finding.percent)}"
    return text


def _front(facts: About, record: Erasure, adapter: bool) -> str:
    """YAML, whose strings are written as JSON's, which YAML reads."""
    license, lines = facts.license or record.license, ["---"]
    lines.append(f"license: {json.dumps(license or UNKNOWN_LICENSE[0])}")
    if not license:
        lines.append(f"license_name: {json.dumps(UNKNOWN_LICENSE[1])}")
    if facts.base:
        lines += [f"base_model: {json.dumps(facts.base)}"]
        lines += [f"base_model_relation: {'adapter' if adapter else 'finetune'}"]
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image", f"tags: {json.dumps(list(TAGS))}", "---"]
    return "\n".join(lines)


def _key_figures(findings: Sequence[Finding]) -> str:
    """The figures of the verdict as a table; empty if there are none."""
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for finding in sorted(findings, key=lambda finding: ROLES.index(finding.role)):
        estimates = (finding.before, finding.after, finding.control)
        cells = (with_interval(e, finding.percent) if e else None for e in estimates)
        what = f"{finding.what}: attack success rate" if finding.role == "attack" else finding.what
        rows.append((what, (*cells, finding.after.n)))
    columns = ("base", "erased", "reseeded baseline, or random prompts", "images")
    return _table(Table("", columns, tuple(rows))) if rows else ""


def _table(table: Table) -> str:
    rows = [["", *table.columns], ["---", *["---:"] * len(table.columns)]]
    for label, cells in table.rows:
        if cells:
            shown = (with_interval(c, name in table.percent) for c, name in zip(cells, table.columns, strict=True))
            rows.append([_md(label), *map(_md, shown)])
        else:
            rows.append([f"**{_md(label)}**", *[""] * len(table.columns)])
    rows[0] = [_md(name) for name in rows[0]]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    note = f"\n\n{_md(table.note)}" if table.note else ""
    title = f"**{_md(table.title)}**\n\n" if table.title else ""
    return f"{title}{lines}{note}"


def _list(values: Mapping[str, Any]) -> str:
    """Nested mappings and lists as indented lists."""

    def lines(name: str, content: Any, depth: int) -> list[str]:
        start = f"{'  ' * depth}- "
        if isinstance(content, Mapping):
            return [f"{start}{_md(name)}:", *(x for k, v in content.items() for x in lines(str(k), v, depth + 1))]
        if isinstance(content, list | tuple) and any(isinstance(c, Mapping) for c in content):
            each = (", ".join(f"{k} {v}" for k, v in c.items()) if isinstance(c, Mapping) else str(c) for c in content)
            return [f"{start}{_md(name)}:", *(f"  {start}{_md(text)}" for text in each)]
        text = ", ".join(map(str, content)) if isinstance(content, list | tuple) else str(content)
        return [f"{start}{_md(name)}: {_md(text)}"]

    return "\n".join(line for name, v in values.items() if v is not None for line in lines(str(name), v, 0))


def _md(text: str) -> str:
    """Text in which Markdown and HTML see no markup, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", " ".join(str(text).split())).replace("&", "&amp;")
