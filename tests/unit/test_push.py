"""Pushing to the hub: what would be uploaded, where to, and what is refused; the hub's functions are a fake's."""

import types
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from esd_jax import report_files
from esd_jax.erasure import Concept, Erasure
from esd_jax.exports import Written
from esd_jax.families.sd import SD
from esd_jax.io import hub


class Hub:
    """What was asked of the hub. public: repositories that exist and are public."""

    def __init__(self, monkeypatch, public=(), error=None):
        self.calls, self.files, self.private, self.error = [], {}, {name: False for name in public}, error
        for name in ("create_repo", "upload_folder", "upload_file"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        assert repo_type == "model" and exist_ok
        if self.error:
            raise self.error
        self.private.setdefault(repo_id, private)

    def repo_info(self, repo_id, *, repo_type):
        return types.SimpleNamespace(private=self.private[repo_id])

    def upload_folder(self, *, repo_id, repo_type, folder_path, path_in_repo, ignore_patterns, commit_message):
        root = Path(folder_path)
        listed = huggingface_hub.utils.filter_repo_objects(
            [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()],
            ignore_patterns=ignore_patterns,
        )
        self.files |= {str(Path(path_in_repo or "") / name): (root / name).read_bytes() for name in listed}

    def upload_file(self, *, repo_id, repo_type, path_or_fileobj, path_in_repo, commit_message):
        content = path_or_fileobj if isinstance(path_or_fileobj, bytes) else Path(path_or_fileobj).read_bytes()
        self.files[path_in_repo] = content


@pytest.fixture
def folder(tmp_path):
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    (model / "unet" / "config.json").write_text("unet")
    (model / "README.md").write_text("of this folder")
    (model / ".lock").write_text("")
    (tmp_path / "x-lora.safetensors").write_text("lora")
    (tmp_path / "before_after.png").write_bytes(b"picture")
    return tmp_path


def erased(base="org/base"):
    record = Erasure(concepts=(Concept("neon style"),), base=base)
    provenance = types.SimpleNamespace(source=base, erased=(record,), folder=None)
    return types.SimpleNamespace(
        provenance=provenance, denoiser="unet", index={"_class_name": "StableDiffusionPipeline"}, family=SD, configs={}
    )


def push(folder, names=("folder",), **options):
    paths = {"folder": folder / "model", "lora": folder / "x-lora.safetensors"}
    model = erased()
    written = [Written(name, paths[name]) for name in names]
    return report_files.push("me/neon", written, report_files.without_measurements(model), model, **options)


def test_a_folder_lies_in_the_root_with_the_card(folder, monkeypatch, unchecked):
    fake = Hub(monkeypatch)
    assert push(folder, picture=folder / "before_after.png") == "https://huggingface.co/me/neon"
    assert fake.private == {"me/neon": True}
    assert set(fake.files) == {"model_index.json", "unet/config.json", "before_after.png", "README.md"}
    made = ModelCard(fake.files["README.md"].decode())
    assert made.data.base_model == "org/base" and made.data.license == "other"
    assert made.data.to_dict()["base_model_relation"] == "finetune"
    assert 'DiffusionPipeline.from_pretrained("me/neon")' in made.text and "(<before_after.png>)" in made.text
    assert "neon style" in made.text and "of this folder" not in made.text


def test_a_file_keeps_its_name(folder, monkeypatch, unchecked):
    fake = Hub(monkeypatch)
    push(folder, ("lora",), picture=folder / "none.png")
    assert set(fake.files) == {"x-lora.safetensors", "README.md"} and fake.files["x-lora.safetensors"] == b"lora"
    made = ModelCard(fake.files["README.md"].decode())
    assert made.data.to_dict()["base_model_relation"] == "adapter"
    assert 'pipe.load_lora_weights("me/neon", weight_name="x-lora.safetensors")' in made.text


def test_several_formats_lie_beside_each_other(folder, monkeypatch, unchecked):
    fake = Hub(monkeypatch)
    push(folder, ("folder", "lora"))
    assert set(fake.files) == {"model_index.json", "unet/config.json", "x-lora.safetensors", "README.md"}


def test_a_public_repository_is_not_written_to_unasked(folder, monkeypatch, unchecked):
    fake = Hub(monkeypatch, public=["me/neon"])
    with pytest.raises(ValueError, match="^me/neon exists and is public: give --public, or another repository$"):
        push(folder)
    assert not fake.files
    push(folder, private=False)
    assert fake.files and fake.private == {"me/neon": False}


@pytest.mark.parametrize(
    "change, message",
    [
        (("get_token", lambda: None), "there is no token; run `hf auth login`, or set HF_TOKEN"),
        (("constants.HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE is set; unset it, and run the command again"),
    ],
    ids=["no token", "offline"],
)
def test_what_is_missing_is_said_in_one_line(folder, monkeypatch, change, message, unchecked):
    fake = Hub(monkeypatch)
    name, value = change
    owner = huggingface_hub.constants if "." in name else huggingface_hub
    monkeypatch.setattr(owner, name.rpartition(".")[2], value)
    with pytest.raises(ValueError, match=f"^cannot push to me/neon: {message}$"):
        push(folder)
    assert not fake.private


def test_what_the_hub_refuses_is_one_line(folder, monkeypatch, unchecked):
    Hub(monkeypatch, error=RuntimeError("403 Forbidden: no rights\nRequest id ..."))
    with pytest.raises(ValueError, match="^cannot push to me/neon: 403 Forbidden: no rights$"):
        push(folder)
    with pytest.raises(ValueError, match="'neon' is no repository of the hub: give ORG/NAME"):
        hub.check_push("neon")


def test_licences_are_read_from_cards(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\n# A model\n")
    assert hub.license_of(tmp_path / "README.md") == "openrail++"
    for text in ("# none\n", "---\nlicense: [\n---\n", "---\n- a\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert hub.license_of(tmp_path / "README.md") is None
    assert hub.license_of(tmp_path / "none.md") is None
