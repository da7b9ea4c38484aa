"""A base, a finished run and the command line itself."""

import shutil
from pathlib import Path

import factories
import pytest
from command_line import erase, without_progress

from esd_jax import cli


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "base"
    factories.make_sd1(folder)
    return folder


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory):
    """A finished run that no test changes."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert cli.main(erase(base, folder, checkpoint_every=1)) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def esd(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr without the lines of progress)."""

    def call(*argv):
        code = cli.main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return code, out, without_progress(err)

    return call
