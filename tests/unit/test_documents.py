"""The documents: where they lead exists, what they have users type is understood, and what they name is there."""

import ast
import copy
import importlib
import re
import tomllib

import documented_calls
import documents
import pytest
from absl import flags
from documents import DOCUMENTS, SHELLS, name_of
from paths import ROOT

from esd_jax import api, cli, exports, recipe
from esd_jax.evaluation import PROTOCOLS
from esd_jax.evaluation.attacks import ATTACKS, FAMILY, PROBES
from esd_jax.methods import METHODS

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
# Folders and files that stand for a user's own.
PLACES = ("BASE", "ERASED", "RUN", "RUN/model", "FOLDER")
OTHER_PROGRAMS = {"cd", "echo", "export", "git", "hf", "ruff", "source"}
ABBREVIATED = r"\.\.\.|\[-|\[BASE|=NAME|\bVERB\b|=FIELD"
LISTS = {  # a flag whose values are names -> these
    "protocol": {*PROTOCOLS, "emoji"},
    "attacks": {*ATTACKS, *PROBES, FAMILY, "all"},
    "format": {*exports.FORMATS, "all"},
    "export": {*exports.FORMATS, "all"},
}
texts = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


@texts
def test_links_lead_to_what_exists(document):
    for link in documents.links(document):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = (document.parent / path).resolve() if path else document
        assert target.exists() and target.is_relative_to(ROOT), f"{name_of(document)} links to {link}"
        assert not anchor or anchor in documents.anchors(target), f"{name_of(document)} links to {link}"


@texts
def test_rows_stand_in_tables(document):
    """After an empty line, a row is no longer one, but a text with bars."""
    assert not [one.content for one in documents.tokens(document) if one.type == "inline" and one.content[:1] == "|"]


@pytest.mark.parametrize("document", [*DOCUMENTS, *CONFIGS], ids=name_of)
def test_files_that_are_named_exist(document):
    """Where a name in capitals stands for the reader's own file, its folder does."""
    folders = "configs|docs|esd_jax|launch|notebooks|tests"
    for path in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./*-]*\w)", document.read_text()):
        pattern = re.sub(r"NAME\w*", "*", path)
        assert any(ROOT.glob(pattern)), f"{name_of(document)} names {path}"


# Commands.


def named(document) -> list[str]:
    """What running text has in backticks; that of the changelog is of the past, too."""
    return [] if document.name == "CHANGELOG.md" else documents.code(document)


def commands(document) -> list[list[str]]:
    """Those of a document's shell blocks, and those in its running text that are whole."""
    blocks = [words for block in documents.blocks(document) if block.language in SHELLS
              for words in documents.commands(block.text)]  # fmt: skip
    starts = ("esd-jax ", "python -m ", "make ", "pip install ")
    inline = [text for text in named(document) if text.startswith(starts) and not re.search(ABBREVIATED, text)]
    return blocks + [words for text in inline for words in documents.commands(text)]


def parse_verb(verb: str, words: list[str]) -> None:
    if verb in ("--help", "--version"):
        return
    nameless = all(word.startswith("-") and not word.startswith("--con") for word in words)
    if verb in ("erase", "tune") and nameless:  # running text speaks of the verb, and of some of its flags
        words = ["Van Gogh", *words]
    values = cli.VERBS[verb].parse(verb, words)
    for name, known in LISTS.items():
        given = (values[name].value if name in values else None) or ()
        assert {*(given.split(",") if isinstance(given, str) else given)} <= {*known}, words


def parse_module(name: str, words: list[str]) -> None:
    """The arguments of `python -m NAME`."""
    if name in ("launch", "esd_jax"):
        return parse_verb(words[0], words[1:]) if words else None
    if name == "pytest":
        for path in words:
            assert path.startswith("-") or path in ("", "slow", "parity and not slow") or (ROOT / path).exists(), path
        return None
    module = importlib.import_module(name)
    if name.startswith("launch."):  # some hand --config.FIELD on, which is checked below
        copy.deepcopy(module.FLAGS)([name, *(word for word in words if not word.startswith("--config."))])


def parse(words: list[str]) -> None:
    """Raises, or asserts, for a command that would not be understood."""
    program, rest = words[0], words[1:]
    if program == "esd-jax":
        parse_verb(rest[0], rest[1:]) if rest else None
    elif re.fullmatch(r"(.*/)?python3?", program):
        if rest[0] == "-m" and rest[1] != "venv":
            parse_module(rest[1], rest[2:])
        elif rest[0] == "-c":
            compile(rest[1], "-c", "exec")
    elif program == "make":
        targets = {*re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE)}
        variables = {*re.findall(r"^(\w+) \?=", MAKEFILE, re.MULTILINE)}
        assert {word for word in rest if "=" not in word} <= targets, words
        assert {word.partition("=")[0] for word in rest if "=" in word} <= variables, words
    elif program == "pip":
        for extras in re.findall(r"\[([\w,-]+)\]", " ".join(rest)):
            assert {*extras.split(",")} <= {*EXTRAS}, words
    elif program in ("sbatch", "launch/tpu_pod.sh"):
        scripts = [word for word in words if word.startswith("launch/")]
        assert all((ROOT / script).exists() for script in scripts)
        parse_verb("erase", words[words.index(scripts[0]) + 1 :])
    else:
        assert program in OTHER_PROGRAMS, words


@pytest.fixture
def anywhere(tmp_path, monkeypatch):
    """A folder with what commands name, in which a hub's checkpoints are known without asking a hub."""
    for place in PLACES:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / "names.txt").write_text("a cat\na rose")
    monkeypatch.chdir(tmp_path)
    known = api.architecture

    def architecture(source, **files):
        return known(source if source in ("sd14", "sd21", "sdxl") else "sdxl" if "xl" in source else "sd14", **files)

    monkeypatch.setattr(api, "architecture", architecture)
    return tmp_path


@texts
def test_commands_are_understood(document, anywhere):
    for words in commands(document):
        try:
            parse(words)
        except Exception as error:
            pytest.fail(f"{name_of(document)}: {' '.join(words)}: {error}")


@pytest.mark.parametrize(
    "text",
    ["esd-jax erase emoji neon --etta=2", "esd-jax evaluate RUN --protocol=slow", "esd-jax attack RUN --attacks=p5d",
     "esd-jax export --run=RUN --format=lora,loha", "make demmo", "make demo X=1", "pip install '.[gpu]'",
     "python -m launch.experiments.levers --target=x", "python -m launch.nothing", "esdjax demo"],
)  # fmt: skip
def test_wrong_commands_are_noticed(text, anywhere):
    errors = (AssertionError, ImportError, KeyError, ValueError, flags.Error)
    with pytest.raises(errors):
        parse(documents.commands(text)[0])


def test_a_shells_words():
    text = 'A=1 B="x y" esd-jax demo "a; b" -o x > y  # comment\npip install . && make \\\n  demo | cat\n'
    words = [["esd-jax", "demo", "a; b", "-o", "x"], ["pip", "install", "."], ["make", "demo"], ["cat"]]
    assert documents.commands(text) == words


def launched() -> list:
    """The programs of launch/ that have flags."""
    paths = sorted(path for path in (ROOT / "launch").rglob("*.py") if "FlagValues()" in path.read_text())
    return [importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in paths]


@pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("document", [*DOCUMENTS, *CONFIGS], ids=name_of)
def test_fields_and_flags_that_are_named_exist(document):
    if document in CONFIGS:
        text = ast.get_docstring(ast.parse(document.read_text())) or ""
    else:
        text = "\n".join(named(document))
    known = {"config", "kind", "help", "version", "FIELD", "nodes", *recipe.field_types()}
    known |= {flag for verb in cli.VERBS.values() for flag in verb.defined()}
    known |= {flag for module in launched() for flag in module.FLAGS}
    for field in re.findall(r"--(?:no)?config\.(\w+)", text):
        assert field in {"FIELD", *recipe.field_types()}, f"{name_of(document)}: {field}"
    for flag in re.findall(r"(?<![\w-])--(\w+)", text):
        assert {flag, flag.removeprefix("no")} & known, f"{name_of(document)}: --{flag}"


# Python.


@texts
def test_python_uses_what_the_package_has(document):
    for block in documents.blocks(document):
        if block.language == "python":
            assert not documented_calls.faults(block.text), f"{name_of(document)}, line {block.line}"
    for text in named(document):
        if re.match(rf"(?:{'|'.join(documented_calls.KNOWN)})[.(]", text) and not re.search(r"\.(?:html|json)$", text):
            wrong = documented_calls.faults(text, documented_calls.KNOWN)
            assert not wrong, f"{name_of(document)}: {text}: {wrong}"


@pytest.mark.parametrize(
    "text",
    ["esd_jax.erese(base)", "import esd_jax\nesd_jax.erase(base, 'x', etta=2)", "sample(base, ['x'], seeds=2)",
     "guidance.SLD.presets('max')", "from esd_jax import formatz", "formats.merge_lora(base, 'a', 1.0, 'x')"],
)  # fmt: skip
def test_wrong_python_is_noticed(text):
    assert documented_calls.faults(text, documented_calls.KNOWN)


def test_every_method_is_in_the_guide_and_in_the_table():
    guide, table = ((ROOT / "docs" / name).read_text() for name in ("choosing.md", "methods.md"))
    for name in METHODS:
        assert f"| `{name}` |" in guide, name
    assert table.count("\n| [") >= len(METHODS)


def test_text_uses_the_fields_terms():
    """Not words of this project's own; names in backticks are the code's."""
    own = r"sham|shams|unrecognisable|judge|judges|judged|dossier|parked|unparked|mend|mended|slips|levers?|unsaid"
    generated = ("docs/fields.md", "esd_jax/demo/model/README.md")
    for document in DOCUMENTS:
        if name_of(document) not in generated:
            text = " ".join(token.content for token in documents.inline(document) if token.type == "text")
            assert not re.findall(rf"\b(?:{own})\b", text, re.IGNORECASE), name_of(document)


# The site.


def test_every_page_is_in_the_navigation():
    written = {path.relative_to(ROOT / "docs").as_posix() for path in DOCUMENTS if (ROOT / "docs") in path.parents}
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    pages = {*re.findall(r"(\S+\.md)$", navigation, re.MULTILINE)}
    assert written <= pages
    elsewhere = {"contributing.md", "changelog.md", "model_card.md", "flow_model_card.md"}
    elsewhere |= {f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert pages - written == elsewhere
