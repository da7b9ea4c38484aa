"""What is installed: the wheel, the configs that it carries, and the jobs that build, test and publish it."""

import shutil
from pathlib import Path

import pytest

from esd_jax import config_files, recipe

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


OTHER_PROJECTS = {  # pyproject.toml beside the package -> whether it is a checkout's
    "none": (None, False),
    "another's": ('[project]\nname = "another"\n', False),
    "without a name": ("[tool.ruff]\nline-length = 120\n", False),
    "not TOML": ("name = esd-jax", False),
    "ours": ('[project]\nname = "esd-jax"\n', True),
}


@pytest.mark.parametrize("which", OTHER_PROJECTS)
def test_configs_beside_the_package_are_read_in_a_checkout_alone(which, tmp_path, monkeypatch):
    """An installed package lies among others, one of which may be called "configs"."""
    text, checkout = OTHER_PROJECTS[which]
    package, beside = tmp_path / "esd_jax", tmp_path / "configs"
    shutil.copytree(ROOT / "configs", package / "configs")
    beside.mkdir()
    for name in ("emoji", "theirs"):
        (beside / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\nget_config = dict\n")
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(config_files, "__file__", str(package / "config_files.py"))
    assert config_files.config_names() == sorted([*CONFIGS, "theirs"] if checkout else CONFIGS)
    assert recipe.read("emoji").concept == "neon style" and not (tmp_path / "executed").exists()
    with pytest.raises(ValueError if checkout else FileNotFoundError, match="theirs"):
        recipe.read("theirs")
    assert (tmp_path / "executed").exists() == checkout
