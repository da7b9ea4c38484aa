"""What a shell completes, asked as bash asks it."""

import shutil
import subprocess

import pytest

from esd_jax.cli import VERBS, completion

# Bash parts words at "=", too, and leaves an empty one behind a space.
ASK = """
COMP_LINE=$1; COMP_POINT=${#COMP_LINE}
IFS=' ' read -ra COMP_WORDS <<< "${COMP_LINE//=/ = }"
[[ "$COMP_LINE" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_esd_jax
echo "${COMPREPLY[@]}"
"""
COMPLETED = {
    "esd-jax era": "erase",
    "esd-jax erase --config=sd14_st": "sd14_style",
    "esd-jax erase emoji --kind=sty": "style",
    "esd-jax erase emoji --lear": "--learning_rate=",
    "esd-jax sample --ste": "--steps=",
}


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
@pytest.mark.parametrize("line", COMPLETED)
def test_bash(line, tmp_path):
    command = ["bash", "-c", completion.script("bash") + ASK, "bash", line]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", COMPLETED[line])


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_verb_is_known_to_every_shell(shell):
    script = completion.script(shell)
    assert all(verb in script for verb in VERBS) and "--config=sdxl_style" in script and "--kind=person" in script
