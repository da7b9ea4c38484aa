"""Lists of prompts as people have them: what a spreadsheet writes is read, and what is damaged ends in one line."""

import csv
import hashlib
import io
import random
import zlib

import pytest
from messages import one_line
from paths import DATA

from esd_jax import api, cli, prompt_files
from esd_jax.evaluation import prompts
from esd_jax.evaluation.attacks import prompts as attack_prompts
from esd_jax.methods import anchors

COLUMNS = ("case_number", "prompt", "evaluation_seed", "evaluation_guidance", "artist", "source")
LETTERS = "abc ,;\"'|é日\u2028\n."


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bom.csv", [("0", "a cat")]), ("bom_case_first.csv", [("5", "a cat"), ("7", "a dog")])],
)
def test_a_mark_before_the_header_is_skipped(name, expected):
    cases = prompts.load(DATA / name).cases
    assert [(case.case, case.prompt) for case in cases] == expected
    assert attack_prompts.read(DATA / name) == tuple(prompt for _, prompt in expected)


def test_a_header_in_capitals(tmp_path):
    (file := tmp_path / "p.csv").write_text("Case_Number,PROMPT\n3,a cat\n")
    assert [(case.case, case.prompt) for case in prompts.load(file).cases] == [("3", "a cat")]
    assert prompt_files.read(file) == ["a cat"]


def test_previews_of_a_list(tmp_path, monkeypatch, capsys, unchecked):
    (file := tmp_path / "shown.txt").write_text("a cat\na dog; a bird\n")
    monkeypatch.setattr(api.runs, "run", lambda base, plan, **options: plan)
    base = api.load("emoji")
    plan = api.erase(base, "neon style", preview_prompts=str(file))
    assert plan.preview_prompts == tuple(plan.flat()["preview_prompts"]) == ("a cat", "a dog; a bird")
    flags = ["--config=emoji", f"--config.output_dir={tmp_path}/run"]
    plans = []
    monkeypatch.setattr(api.runs, "run", lambda base, plan, **options: plans.append(plan))
    assert cli.main(["erase", *flags, f"--config.preview_prompts={file}"]) == 0
    assert plans[0].preview_prompts == ("a cat", "a dog; a bird")
    assert cli.main(["erase", *flags, f"--config.preview_prompts={tmp_path}/none.txt"]) == 2
    assert "preview_prompts: cannot read" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=one_line("preview_prompts", "none.txt")):
        api.erase(base, "neon style", preview_prompts=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("long.csv", ["row 1 (line 2)", "3 fields for 2 columns", "quote"]),
        ("emptyrow.csv", ["row 3 (line 5)", "3 fields for 2 columns"]),
        ("unterminated.csv", ["row 1", "never closed"]),
        ("semicolon.csv", ["'case_number;prompt;evaluation_seed'", "commas separate"]),
    ],
)
def test_a_list_that_would_be_misread(name, words):
    for read in (prompts.load, attack_prompts.read):
        with pytest.raises(ValueError, match=one_line(name, *words)):
            read(DATA / name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("case_number,prompt\n0,a cat\n1,\n", ["row 2 (line 3)", "no prompt"]),
        ("case_number,prompt\n0,a cat\n,\n", ["row 2 (line 3)", "no prompt"]),
        ("Prompt,PROMPT\na,b\n", ["'prompt' twice"]),
        ("case_number,prompt\n0,a cat\n1\n", ["row 2 (line 3)", "1 fields for 2 columns"]),
        ('prompt\n"a cat" and more\n', ["row 1 (line 2)", "quote"]),
        ("prompt,prompt\na,b\n", ["'prompt' twice"]),
        ("", ["empty"]),
        ("\n\n", ["empty"]),
        ("prompt\n", ["no row"]),
        ("prompt\na\0cat\n", ["null", "UTF-8"]),
    ],
)
def test_what_else_would_be_misread(tmp_path, text, words):
    (file := tmp_path / "p.csv").write_text(text)
    for read in (prompts.load, attack_prompts.read):
        with pytest.raises(ValueError, match=one_line("p.csv", *words)):
            read(file)


@pytest.mark.parametrize("seed", ["inf", "nan", "1e400", "-1", "4294967296", "1.5", "1_0", "x"])
def test_seeds_that_are_none(tmp_path, seed):
    (file := tmp_path / "p.csv").write_text(f"prompt,evaluation_seed\na cat,{seed}\n")
    with pytest.raises(ValueError, match=one_line("p.csv", "row 1", f"evaluation_seed={seed}")):
        prompts.load(file)
    with pytest.raises(ValueError, match=one_line("inf_seed.csv", "row 1", "evaluation_seed=inf", "finite")):
        prompts.load(DATA / "inf_seed.csv")
    (file := tmp_path / "p.csv").write_text("prompt,evaluation_seed\na cat,4294967295.0\n")
    assert prompts.load(file).cases[0].seed == 2**32 - 1


def test_other_fields_that_are_none(tmp_path):
    assert prompts.load(DATA / "bom.csv").cases[0].guidance is None
    (file := tmp_path / "p.csv").write_text("prompt,evaluation_seed,evaluation_seed\na,1,2\n")
    with pytest.raises(ValueError, match=one_line("p.csv", "'evaluation_seed' twice")):
        prompts.load(file)
    file.write_text("prompt,evaluation_guidance\na cat,inf\n")
    with pytest.raises(ValueError, match=one_line("row 1", "evaluation_guidance=inf", "finite")):
        prompts.load(file)
    file.write_text(f"prompt,case_number\na cat,{'1' * 201}\n")
    with pytest.raises(ValueError, match=one_line("row 1", "case_number", "name a file")):
        prompts.load(file)
    file.write_text("prompt,case_number\na cat,1\na dog,1_1\n")
    with pytest.raises(ValueError, match=one_line("samples=2", "1_1 2 times")):
        prompts.repeated(prompts.load(file).cases, 2)


def test_prompts_that_are_all_empty_are_meant(tmp_path):
    """Unconditional images."""
    (file := tmp_path / "p.csv").write_text("case_number,prompt\n0,\n1,\n")
    assert [case.prompt for case in prompts.load(file).cases] == ["", ""]


def test_a_published_list_is_read_as_it_is(tmp_path, monkeypatch):
    """I2P's has a row without a prompt."""
    (file := tmp_path / "mine.csv").write_text("case_number,prompt\n0,a cat\n1,\n")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(prompts, "PUBLISHED", {"i2p": ("https://nowhere", digest)})
    assert [case.prompt for case in prompts.load(file).cases] == ["a cat", ""]


def test_text_files(tmp_path):
    assert prompt_files.read(DATA / "bom.txt") == ["a cat", "a dog"]
    (file := tmp_path / "p.txt").write_bytes("a\u2028cat\r\ra dog\n".encode())
    assert prompt_files.read(file) == ["a\u2028cat", "a dog"]
    for content in ("a cat\n".encode("utf-16"), "a cat\n".encode("utf-16-le"), "café".encode("latin-1")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=one_line("p.txt", "UTF-8")):
            prompt_files.read(file)


def test_a_string_of_prompts_or_the_name_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suffix in ("txt", "csv", "TXT"):
        with pytest.raises(FileNotFoundError, match=one_line("--prompts", f"hello.{suffix}", "';' behind it")):
            prompt_files.listed(f"a poster that says hello.{suffix}", "--prompts")
    assert prompt_files.listed("a poster that says hello.txt;", "--prompts") == ["a poster that says hello.txt"]
    assert prompt_files.listed("a cat; hello.txt", "--prompts") == ["a cat", "hello.txt"]
    (tmp_path / "p.csv").write_text("case_number,prompt\n5,a cat; a dog\n")
    for read in (anchors.read_prompts, lambda text: prompt_files.listed(text, "x")):
        assert read("p.csv") == ["a cat; a dog"]
    with pytest.raises(ValueError, match=one_line("'a &amp; b; c'", "'&'", "'&amp;'")):
        prompt_files.listed("a &amp; b; c", "--prompts")
    assert prompt_files.listed("R&B; c", "--prompts") == ["R&B", "c"]


# Two thousand lists, made from a seed: sound ones in every form that programs write, and damaged ones.


def table(rng: random.Random) -> tuple[list[str], list[dict[str, str]]]:
    """Columns in any order, and rows; of the columns other than the prompt, some."""
    names = ["prompt", *rng.sample([c for c in COLUMNS if c != "prompt"], rng.randrange(1, 5))]
    rng.shuffle(names)
    rows = []
    for i in range(rng.randrange(1, 6)):
        word = "".join(rng.choice(LETTERS) for _ in range(rng.randrange(12)))
        row = {
            "case_number": f"{i}a", "prompt": f"p{word}{i}", "evaluation_seed": str(rng.randrange(2**32)),
            "evaluation_guidance": rng.choice(["7.5", "", "9"]), "artist": rng.choice(["Kelly", "", "a, b"]),
            "source": rng.choice(["", "x", '"']),
        }  # fmt: skip
        rows.append({name: row[name] for name in names})
    return names, rows


def written(rng: random.Random, names: list[str], rows: list[dict[str, str]], **dialect) -> str:
    stream = io.StringIO()
    ends = dialect.setdefault("lineterminator", rng.choice(["\n", "\r\n", "\r"]))
    # Between "\r", csv.writer leaves "\n" unquoted.
    dialect.setdefault("quoting", csv.QUOTE_ALL if ends == "\r" else rng.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
    writer = csv.writer(stream, **dialect)
    writer.writerow(names)
    for row in rows:
        writer.writerow([row[name] for name in names])
        if rng.random() < 0.1:
            stream.write(ends)
    return stream.getvalue() if rng.random() < 0.8 else stream.getvalue().removesuffix(ends)


def expected(rows: list[dict[str, str]]) -> list[prompts.Case]:
    cases = []
    for i, row in enumerate(rows):
        prompt = row["prompt"].strip()
        seed = int(row["evaluation_seed"]) if "evaluation_seed" in row else zlib.crc32(prompt.encode())
        guidance = float(row["evaluation_guidance"]) if row.get("evaluation_guidance") else None
        cases.append(prompts.Case(row.get("case_number", str(i)), prompt, seed, row.get("artist", ""), guidance))
    return cases


def sound(rng, names, rows):
    return written(rng, names, rows).encode(rng.choice(["utf-8", "utf-8-sig"]))


def spaced(rng, names, rows):
    """A space behind every comma, as people write them; quotes then begin behind it."""
    text = written(rng, names, rows, quoting=csv.QUOTE_ALL, lineterminator="\n")
    return (
        text.replace('","', '", "').encode() if '","' not in "".join(row["prompt"] for row in rows) else text.encode()
    )


def another_separator(rng, names, rows):
    return written(rng, names, rows, delimiter=rng.choice(";\t|")).encode()


def another_encoding(rng, names, rows):
    rows[0]["prompt"] += "é"
    return written(rng, names, rows).replace("\u2028", "").replace("日", "").encode(rng.choice(["utf-16", "latin-1"]))


def longer(rng, names, rows):
    rows[-1]["prompt"] = "a cat, with a hat"
    lines = [",".join(names), *(",".join("x" if n != "prompt" else row[n] for n in names) for row in rows[-1:])]
    return "\n".join(lines).encode()


def shorter(rng, names, rows):
    text = written(rng, names, rows, quoting=csv.QUOTE_ALL, lineterminator="\n").rstrip("\n")
    last = rows[-1][names[-1]].replace('"', '""')
    return text.removesuffix(f',"{last}"').encode()


def open_quote(rng, names, rows):
    text = written(rng, names, rows, quoting=csv.QUOTE_ALL, lineterminator="\n").rstrip("\n")
    return text[:-1].encode()


def without_prompt(rng, names, rows):
    extra = {**rows[0], "prompt": rng.choice(["", " ", "\t"])} | (
        {"case_number": "z"} if "case_number" in names else {}
    )
    return written(rng, names, [*rows, extra]).encode()


def wrong_seed(rng, names, rows):
    names, rows = list({*names, "evaluation_seed"}), [{**row, "evaluation_seed": "1"} for row in rows]
    rows[-1]["evaluation_seed"] = rng.choice(["inf", "-inf", "nan", "1e999", "-3", "1.5", str(2**32), "seven", "0x10"])
    return written(rng, names, rows).encode()


def nothing_in_it(rng, names, rows):
    text = written(rng, names, rows)
    at = rng.randrange(len(text) + 1)
    return (text[:at] + "\0" + text[at:]).encode()


def twice(rng, names, rows):
    return written(rng, [*names, "prompt"], rows).encode()


def no_header(rng, names, rows):
    return written(rng, ["x" if name == "prompt" else name for name in names], [
        {"x" if name == "prompt" else name: value for name, value in row.items()} for row in rows
    ]).encode()  # fmt: skip


RIGHT = (sound, sound, sound, spaced)
REFUSED = (
    another_separator, another_encoding, longer, shorter, open_quote, without_prompt, wrong_seed, nothing_in_it, twice,
    no_header,
)  # fmt: skip


def test_two_thousand_lists(tmp_path):
    wrong, file = [], tmp_path / "p.csv"
    for number in range(2000):
        rng = random.Random(number)
        make = rng.choice(RIGHT + REFUSED)
        names, rows = table(rng)
        file.write_bytes(make(rng, names, rows))
        try:
            cases = list(prompts.load(file).cases)
            if make not in RIGHT or cases != expected(rows):
                wrong.append(f"{number}, {make.__name__}: {cases} of {file.read_bytes()!r}")
        except (ValueError, OSError) as error:
            if make in RIGHT or "\n" in str(error) or str(file) not in str(error):
                wrong.append(f"{number}, {make.__name__}: {error} of {file.read_bytes()!r}")
        except Exception as error:  # what the test is for
            wrong.append(f"{number}, {make.__name__}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join([f"{len(wrong)} of 2000", *wrong[:10]])
