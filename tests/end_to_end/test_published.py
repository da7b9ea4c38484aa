"""An erased model that is published: its card, what is uploaded, and code of the report that diffusers runs."""

import json
import re
import types

import evaluated
import huggingface_hub
import pytest
from huggingface_hub import ModelCard

import esd_jax
from esd_jax import cli, exports, run_facts
from esd_jax.erasure import Concept, Erasure
from esd_jax.evaluation.report.about import File


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a reported run: base/, and run/ with exports."""
    _, _, folder = evaluated.base_and_run(tmp_path_factory.mktemp("published"))
    assert esd("export", f"--run={folder / 'run'}", f"--output={folder / 'run' / 'exports'}",
               "--format=single,lora,difference", "--noverify") == 0  # fmt: skip
    assert esd("report", folder / "run") == 0
    return folder / "run"


def esd(*words):
    return cli.main([*map(str, words)])


def test_an_exported_folder_carries_its_card(run, tmp_path, capsys):
    assert esd("export", f"--run={run}", f"--output={tmp_path / 'model'}", "--noverify") == 0
    assert str(tmp_path / "model" / "README.md") in capsys.readouterr().out
    for folder in (tmp_path / "model", run / "model"):
        made = ModelCard.load(folder / "README.md")
        assert made.data.library_name == "diffusers" and "esd-jax" in made.data.tags
        assert "# cat, erased from base" in made.text and "before_after.png" in made.text
        assert (folder / "before_after.png").read_bytes() == (run / "before_after.png").read_bytes()
        assert "cat: nothing" not in made.text and "Nothing was measured yet." in made.text
    assert esd("export", f"--run={run}", f"--output={tmp_path / 'model'}", "--noverify", "--overwrite") == 0
    assert esd("export", f"--run={run}", f"--output={tmp_path / 'half'}", "--noverify", "--strength=0.5") == 0
    assert not (tmp_path / "half" / "before_after.png").exists()  # which shows the whole change
    assert "# cat, erased from base" in (tmp_path / "half" / "README.md").read_text()


def test_the_report_says_what_was_not_measured(run, capsys):
    assert esd("report", run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Nothing was measured yet." and lines[1].startswith("report   ")
    figures = json.loads((run / "report.json").read_text())
    assert figures["sentence"] == "Nothing was measured yet." and figures["title"] == "cat"
    page = (run / "report.html").read_text()
    session = json.loads((run / "sessions.jsonl").read_text().splitlines()[0])
    assert "CPU" in page and session["device"] == "cpu" and 'href="exports/' in page
    assert len(page.encode()) < 1e6


def test_what_is_exported_is_pushed(run, tmp_path, capsys, monkeypatch):
    uploads = {}

    def upload_folder(*, folder_path, path_in_repo, **_):
        uploads[path_in_repo or "."] = folder_path

    def upload_file(*, path_or_fileobj, path_in_repo, **_):
        uploads[path_in_repo] = path_or_fileobj

    hidden = types.SimpleNamespace(repo_info=lambda *_, **__: types.SimpleNamespace(private=True))
    fakes = {"get_token": lambda: "token", "create_repo": lambda *_, **__: None, "HfApi": lambda: hidden,
             "upload_folder": upload_folder, "upload_file": upload_file}  # fmt: skip
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    command = ("export", f"--run={run}", f"--output={tmp_path / 'model'}", "--noverify", "--push_to_hub=me/no-cat")
    assert esd(*command) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err and not (tmp_path / "model").exists()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name, fake in fakes.items():
        monkeypatch.setattr(huggingface_hub, name, fake)
    assert esd(*command) == 0
    assert "pushed to https://huggingface.co/me/no-cat (private)" in capsys.readouterr().out
    assert uploads["."] == tmp_path / "model" and uploads["before_after.png"] == run / "before_after.png"
    assert 'from_pretrained("me/no-cat")' in ModelCard(uploads["README.md"].decode()).text
    assert esd("export", f"--run={run}", f"--output={tmp_path / 'x'}", "--public") == 2
    assert "--public is for --push_to_hub" in capsys.readouterr().err


@pytest.mark.slow
def test_diffusers_runs_the_code_for_the_embedded_model(tmp_path):
    """Whose networks lie in two dtypes."""
    base = esd_jax.load("emoji")
    kept = base.params["unet"]["conv_out.bias"]
    erased = base.with_edits({"unet/conv_out.bias": kept}, Erasure(concepts=(Concept("a cat"),), base="emoji"))
    exports.export(erased, tmp_path / "model")
    exports.export(erased, tmp_path / "delta.safetensors", "delta")
    files = [File("model/", 0, "", "folder"), File("delta.safetensors", 0, "", "delta")]
    for use in run_facts.uses(tuple(files), erased, folder=str(tmp_path)):
        scope = {}
        exec(use.code.replace('"cuda"', '"cpu"').replace("steps=20", "steps=2"), scope)
        assert scope["image"].size == (64, 64), use.title


@pytest.mark.slow
def test_diffusers_runs_the_code_of_the_card(run, monkeypatch):
    """Each snippet, but for the device, and with few steps."""
    monkeypatch.chdir(run.parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    blocks = re.findall(r"\*\*([^*\n]+)\*\*\n\n```python\n(.+?)```", (run / "ERASURE.md").read_text(), re.S)
    titles = [title for title, _ in blocks]
    assert titles == ["diffusers: the erased model", "diffusers: the single file", "diffusers: the LoRA on the base",
                      "diffusers: the delta on the base", "esd_jax: the difference, at any strength"]  # fmt: skip
    for title, code in blocks:
        code = code.replace('"cuda"', '"cpu"').replace("path/to/the/base", "base")
        code = code.replace('pipe("cat"', 'pipe("cat", num_inference_steps=2').replace('["cat"]', '["cat"], steps=2')
        code = code.replace('"run/', f'"{run.name}/').replace(', "cat")', ', "cat", steps=2)')
        scope = {}
        exec(compile(code, title, "exec"), scope)
        assert scope["image"] is not None, title
