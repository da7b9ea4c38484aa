"""Fields that a run refuses, a dry run refuses, too: files that are not there, and what means nothing."""

import pytest

from esd_jax import cli
from esd_jax.cli import dry_run


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("--method=uce", "--retain=nofile.txt"), "there is no file nofile.txt"),
        (("--method=ablating", "--anchor_prompts=nofile.csv"), "nofile.csv"),
        (("--method=forget_me_not", "--images=nofile.png"), "images: cannot read nofile.png"),
        (("--method=esd", "--rounds_search=5"), "rounds_search means nothing without rounds"),
        (("--method=uce", "--preserve_weight=2"), "preserve_scale is what weighs"),
        (("--config=esd_x", "--preserve_weight=2"), "preserve_weight means nothing without preserved prompts"),
        (("--config=esd_x", "--decay_to=0.5"), "decay_to means nothing without a decay"),
        (("--config=esd_x", "--context_eta=0.5"), "context_eta means nothing without contexts"),
        (("--method=forget_me_not", "--inversion_tokens=cat", "--inversion_steps=0"), "without an inversion"),
        (("--method=all_but_one", "--instructions=a cat:-7", "--erase_scale=-3"), "beside instructions"),
        (("--method=all_but_one", "--delta=implicit", "--kappa=0.5"), "kappa means nothing with delta='implicit'"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(typed, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "report", lambda *_: None)
    assert cli.main(["erase", "emoji", "a cat", "--dry_run", *typed]) == 2
    assert message in capsys.readouterr().err
    if "rounds_search=5" in typed[-1]:
        assert cli.main(["erase", "emoji", "a cat", "--dry_run", "--rounds_every=9", *typed]) == 0
