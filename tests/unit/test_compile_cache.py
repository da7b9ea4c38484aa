"""Where compiled programs are kept."""

import subprocess
import sys
from pathlib import Path

import pytest

import esd_jax
from esd_jax import compile_cache

HOW = {"seed": 3, "steps": 2, "guidance_scale": 3.0, "sampler": "ddim"}


@pytest.fixture(scope="module")
def base():
    return esd_jax.load("emoji")


ASK = "import jax; from esd_jax import compile_cache; {}; print(jax.config.jax_compilation_cache_dir)"


@pytest.mark.parametrize(
    "env, before, expected",
    [
        ({}, "pass", "{tmp}/esd_jax/xla"),
        ({"ESD_JAX_COMPILATION_CACHE": "0"}, "pass", "None"),
        ({"ESD_JAX_COMPILATION_CACHE": "1"}, "pass", "{tmp}/esd_jax/xla"),
        ({"JAX_COMPILATION_CACHE_DIR": "{tmp}/mine"}, "pass", "{tmp}/mine"),
        ({}, "jax.config.update('jax_compilation_cache_dir', 'own')", "own"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "pass", "None"),
    ],
)
def test_programs_are_kept_where_the_command_line_keeps_them(env, before, expected, tmp_path):
    clean = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(esd_jax.__file__).parent.parent), "HOME": str(tmp_path)}
    env = {"XDG_CACHE_HOME": "{tmp}", **env}
    env = clean | {name: value.format(tmp=tmp_path) for name, value in env.items()}
    command = [sys.executable, "-c", ASK.format(f"{before}; compile_cache.use()")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [expected.format(tmp=tmp_path)]


def test_the_verbs_ask_for_it_before_they_compile(base, monkeypatch):
    asked = []
    monkeypatch.setattr(compile_cache, "use", lambda: asked.append(True))
    esd_jax.sample(base, [], **HOW)
    with pytest.raises(FileNotFoundError):
        esd_jax.load("nothing/at/all")
    with pytest.raises(ValueError, match="lr"):
        esd_jax.erase(base, "neon style", lr=3)  # pyright: ignore[reportCallIssue]
    assert asked == [True] * 3
