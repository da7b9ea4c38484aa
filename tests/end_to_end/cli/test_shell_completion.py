"""What bash, zsh and fish complete, each asked as its user asks it."""

import os
import pty
import re
import select
import shutil
import subprocess
import time

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
    "esd-jax erase --config=sd14_st": "--config=sd14_style",
    "esd-jax erase emoji --kind=sty": "--kind=style",
    "esd-jax erase emoji --lear": "--learning_rate=",
    "esd-jax sample --ste": "--steps=",
}


# What else is completed: files, also behind "=", and nothing where nothing fits.
FILES = {
    "esd-jax report ru": "runs/",
    "esd-jax sample --output=ru": "--output=runs/",
    "esd-jax sample --unknown": "--unknown",
}


def need(shell):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")


class Terminal:
    """An interactive zsh, of which a key (Ctrl-X) prints the line that is being typed."""

    def __init__(self, folder, setup):
        self.screen, side = pty.openpty()
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), side)
        env = os.environ | {"TERM": "dumb", "HOME": str(folder)}
        self.process = subprocess.Popen(["zsh", "-f", "-i"], cwd=folder, env=env, start_new_session=True, **ends)
        os.close(side)
        show = "_show() { print -r -- \"<<$BUFFER>>\"; BUFFER= }; zle -N _show; bindkey '^X' _show"
        (folder / "setup.zsh").write_text(f"{setup}\n{show}\nprint -r -- '<<'ready'>>'\n")
        self.type("unsetopt prompt_cr prompt_sp; source ./setup.zsh\n")
        assert self.read() == "ready"

    def type(self, keys):
        os.write(self.screen, keys.encode())

    def read(self):
        """The next text that the terminal shows between << and >>."""
        shown, end = "", time.monotonic() + 30
        while not (match := re.search(r"<<(.*?)>>", shown)):
            assert time.monotonic() < end, shown
            if select.select([self.screen], [], [], 0.1)[0]:
                shown += os.read(self.screen, 65536).decode(errors="replace")
        return match[1]

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


@pytest.mark.parametrize("way", ["sourced", "in fpath"])
def test_zsh(way, tmp_path):
    need("zsh")
    (tmp_path / "runs").mkdir()
    functions = tmp_path / "functions"
    functions.mkdir()
    (functions / "_esd-jax").write_text(completion.script("zsh"))
    sourced = "autoload -U compinit; compinit -u -D; source functions/_esd-jax"
    setup = sourced if way == "sourced" else "fpath=($PWD/functions $fpath); autoload -U compinit; compinit -u -D"
    terminal = Terminal(tmp_path, setup)
    try:
        for line, word in (COMPLETED | FILES if way == "sourced" else FILES).items():
            terminal.type(f"{line}\t")
            time.sleep(0.3)  # a Tab with more keys behind it is typed text
            terminal.type("\x18")
            assert terminal.read().rstrip() == f"{line.rpartition(' ')[0]} {word}"
    finally:
        terminal.close()


@pytest.mark.parametrize("line", COMPLETED | FILES)
def test_fish(line, tmp_path):
    need("fish")
    (tmp_path / "runs").mkdir()
    (tmp_path / "esd-jax.fish").write_text(completion.script("fish"))
    ask = ["fish", "--no-config", "-c", "source esd-jax.fish; complete -C $argv[1]", line]
    env = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(ask, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    word = (COMPLETED | FILES)[line]
    assert done.stdout.split() == ([] if word == "--unknown" else [word])


@pytest.mark.parametrize("line", COMPLETED)
def test_bash(line, tmp_path):
    need("bash")
    command = ["bash", "-c", completion.script("bash") + ASK, "bash", line]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    replaced = COMPLETED[line].rpartition("=")[2] if "=" in line else COMPLETED[line]  # what follows "=" alone
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", replaced)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_verb_is_known_to_every_shell(shell):
    script = completion.script(shell)
    assert all(verb in script for verb in VERBS) and "--config=sdxl_style" in script and "--kind=person" in script
