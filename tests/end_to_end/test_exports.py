"""Every format: written, read again and compared, from Python and by the command."""

import json
import shutil

import factories
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from command_line import without_progress
from exported import FIELDS, IN, UNET, damaged, erased_run, in_every_format
from messages import one_line

import esd_jax
from esd_jax import api, cli, exports
from esd_jax.exports import FORMATS
from esd_jax.io import ldm_file
from esd_jax.io.diffusers import read_exact
from esd_jax.io.single_file import export_single

STEM = "sd1-without-cat"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return erased_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    return in_every_format(run[1], tmp_path_factory.mktemp("all"))


def test_all_formats_verify(run, written):
    folder, files = written
    assert files.keys() == FORMATS.keys() and len(list(folder.iterdir())) == len(FORMATS)
    total = sum(len(params) for params in run[1].params.values())
    for name, one in files.items():
        assert one.path == folder / f"{STEM}{FORMATS[name].ending}" and one.path.exists()
        assert one.changed == len(run[1].edits)
        assert one.others == (total - one.changed if FORMATS[name].whole else 0)
        assert one.carried > (0.9 if name == "delta" else 0.99) and one.levels <= 1  # a delta holds W, not its change
    dtypes = {name: one.dtypes for name, one in files.items()}
    assert dtypes["folder"] == dtypes["single"] == ("float16",) and dtypes["orbax"] == ("float32",)
    assert dtypes["delta"] == ("bfloat16",) and dtypes["difference"] == dtypes["lora"] == ()
    assert f"verified: {len(run[1].edits)} trained tensors in float16, " in str(files["folder"])
    assert "% of the change" in str(files["lora"]) and "not carried" in str(files["kohya"])


def test_lossless_formats_draw_what_the_folder_draws(run, written):
    folder, files = written
    base = esd_jax.load(run[1].provenance.folder)
    draw = lambda model: esd_jax.sample(model, ["cat", "dogs"], steps=3)  # noqa: E731
    expected = draw(api.opened(base, files["folder"].path))
    np.testing.assert_array_equal(draw(api.opened(base, files["single"].path)), expected)
    exact = exports.export(run[1], folder / "exact.safetensors", "delta", dtype="float32").path
    np.testing.assert_array_equal(draw(api.opened(base, exact)), draw(run[1]))
    np.testing.assert_array_equal(draw(FORMATS["orbax"].read(base, files["orbax"].path)), draw(run[1]))


def test_a_single_file_becomes_a_sharded_folder_of_a_variant(run, written, tmp_path):
    base = esd_jax.load(written[1]["single"].path, config=run[1].provenance.folder)
    name = next(iter(run[1].edits))
    edited = base.with_edits({name: read_exact(base, [name])[name] + 0.5}, {"concepts": [{"text": "cat"}]})
    path = esd_jax.export(edited, tmp_path / "x", verify=True, max_shard_size=500_000, variant="fp16")
    assert len(list((path / "unet").glob("*.fp16-*-of-*.safetensors"))) > 1
    assert (path / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()


def test_a_single_file_in_another_dtype(run, tmp_path):
    path = tmp_path / "x.safetensors"
    one = exports.export(run[1], path, "single", verify=True, dtype="bfloat16")
    assert one.dtypes == ("bfloat16",) and one.others > 100 and 0 < one.carried < 1
    assert {tensor.dtype for tensor in safetensors.torch.load_file(path).values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="was not trained, but is not as it was"):
        exports.verified(run[1], path, "single")
    with pytest.raises(ValueError, match="takes no dtype"):
        exports.export(run[1], tmp_path / "folder", "folder", dtype="bfloat16")


def test_into_a_file_of_another_dtype(run, written, tmp_path):
    """What was not trained is the file's own: more exact than the folder's, or less."""
    factories.make_sd1(tmp_path / "sd1")
    exact = esd_jax.load(tmp_path / "sd1")
    file = export_single(exact, tmp_path / "exact.safetensors")
    half = written[1]["single"].path
    for base, into, dtype in [(run[1], file, "float32"), (exact, half, "float16")]:
        record = {"concepts": [{"text": "cat"}]}
        edited, path = base.with_edits(run[1].edits, record), tmp_path / f"{dtype}.safetensors"
        one = exports.export(edited, path, "single", verify=True, into=into)
        assert one.dtypes == (dtype,) and one.others > 100
        damaged(path, lambda tensors: tensors.update({IN: tensors[IN] * tensors[IN].dtype.type(1.001)}))
        with pytest.raises(ValueError, match=one_line("conv_in.bias", "was not trained")):
            exports.verified(edited, path, "single", into=into)


def test_a_file_that_says_what_it_predicts(run, written, tmp_path, monkeypatch):
    """The architecture that its shapes tell says otherwise."""
    monkeypatch.setattr(ldm_file, "WIDTHS", {factories.WIDTH: "sdxl"})
    monkeypatch.setattr(ldm_file.architectures, "folder", lambda _: run[1].provenance.folder)
    tensors = safetensors.torch.load_file(written[1]["single"].path)
    safetensors.torch.save_file(tensors, tmp_path / "v.safetensors", {"modelspec.prediction_type": "v"})
    base, name = esd_jax.load(tmp_path / "v.safetensors"), next(iter(run[1].edits))
    edited = base.with_edits({name: read_exact(base, [name])[name] + 0.5})
    path = exports.export(edited, tmp_path / "out.safetensors", "single", verify=True).path
    for pipeline in (base, esd_jax.load(path), api.opened(base, path)):
        assert pipeline.schedule.prediction_type == "v_prediction"


def test_every_file_says_what_was_erased(run, written):
    for name, one in written[1].items():
        files = [one.path] if one.path.is_file() else [one.path / UNET]
        if name == "orbax":
            continue  # its records are compared by `verified`
        with safetensors.safe_open(files[0], "np") as file:
            metadata = file.metadata()
        assert json.loads(metadata["esd_jax"])[0]["concepts"][0]["text"] == "cat" and metadata["esd_jax.note"] == "x"


def test_a_lora_says_how_much_it_carries(run, tmp_path):
    shares = [
        exports.export(run[1], tmp_path / f"{rank}.safetensors", "lora", verify=True, rank=rank).carried
        for rank in (1, 4, 32)
    ]
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.99


def test_wrong_options(run, tmp_path):
    for format, options, words in [
        ("zip", {}, ["format='zip'", "folder, single"]),
        ("folder", {"rank": 4}, ["takes no rank", "lora, kohya"]),
        ("orbax", {"colour": 1}, ["takes no colour"]),
    ]:
        with pytest.raises(ValueError, match=one_line(*words)):
            exports.export(run[1], tmp_path / "x", format, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["single", "delta", "difference", "lora", "kohya"])
def test_no_file_takes_the_place_of_the_base(run, written, tmp_path, format):
    """Not even if it may replace what is there: without its base, a change is worth nothing."""
    path, link = tmp_path / "base.safetensors", tmp_path / "link.safetensors"
    shutil.copy(written[1]["single"].path, path)
    link.symlink_to(path)
    base, before = esd_jax.load(path, config=run[1].provenance.folder), path.read_bytes()
    edited = base.with_edits(run[1].edits)
    for target in (path, link):
        with pytest.raises(ValueError, match=one_line(target, "is read from")):
            exports.export(edited, target, format, overwrite=True)
    assert path.read_bytes() == before and link.is_symlink()


def test_several_formats_are_written_all_or_none(run, tmp_path):
    """What one of them cannot do is said before another is written, which takes minutes at full size."""
    name = "text_encoder/final_layer_norm.bias"
    both = run[1].with_edits({name: run[1].params["text_encoder"][name.partition("/")[2]] + 1})
    for pipeline, formats, options, words in [
        (both, ["folder", "delta"], {}, ["delta holds unet tensors alone", name, "folder, single, lora, kohya"]),
        (run[1], ["folder", "orbax"], {"rank": 4}, ["folder, orbax", "rank"]),
        (run[1], ["folder", "zip"], {}, ["format='zip'"]),
    ]:
        with pytest.raises(ValueError, match=one_line(*words)):
            exports.export_all(pipeline, tmp_path, formats, **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / f"{STEM}-orbax").mkdir()  # an empty folder is in nobody's way
    exports.export_all(run[1], tmp_path, ["orbax", "delta"])
    with pytest.raises(ValueError, match=one_line("-delta.safetensors exists", "overwrite=True")):
        exports.export_all(run[1], tmp_path, ["folder", "delta"])
    assert len(list(tmp_path.iterdir())) == 2


def test_an_orbax_tree_belongs_to_its_base_and_replaces_only_its_like(run, written, tmp_path):
    path = written[1]["orbax"].path
    factories.make_sd1(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=one_line(path, "another base")):
        FORMATS["orbax"].read(esd_jax.load(tmp_path / "other"), path)
    (tmp_path / "empty").mkdir()  # is in nobody's way
    exports.export(run[1], tmp_path / "empty", "orbax")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    for folder, options in ((path, {}), (tmp_path / "full", {"overwrite": True})):
        with pytest.raises((ValueError, FileNotFoundError), match=one_line(folder)):
            exports.export(run[1], folder, "orbax", **options)
    assert (tmp_path / "full" / "letter.txt").exists()
    exports.export(run[1], path, "orbax", overwrite=True)
    base = esd_jax.load(run[1].provenance.folder)
    again = FORMATS["orbax"].read(base, path)
    np.testing.assert_array_equal(*(np.asarray(next(iter(p.edits.values()))) for p in (again, run[1])))


# The command.


def said(capsys, *argv):
    code = cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, without_progress(err)


def test_the_command_writes_all_formats(run, tmp_path, capsys):
    code, out, err = said(capsys, "export", f"--run={run[0]}", f"--output={tmp_path}", "--format=all", "--rank=4")
    assert (code, err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {STEM + format.ending for format in FORMATS.values()}
    assert out.count("verified: ") == len(FORMATS) and out.count("rank 4 in ") == 2
    assert set(cli.export.FORMATS) == FORMATS.keys()


def test_the_command_with_strengths_and_merges(run, written, tmp_path, capsys):
    base, paths = run[1].provenance.folder, {name: one.path for name, one in written[1].items()}
    half = tmp_path / "half.safetensors"
    assert said(capsys, "export", f"--run={run[0]}", "--strength=0.5", "--format=delta", "--dtype=float32",
                f"--output={half}")[0] == 0  # fmt: skip
    with safetensors.safe_open(half, "np") as file:
        assert file.metadata()["esd_jax.strength"] == "0.5"
    first, loaded = read_exact(run[1], run[1].edits), esd_jax.load(base)
    before = read_exact(loaded, run[1].edits)
    for name, value in api.opened(loaded, half).edits.items():
        np.testing.assert_allclose(value, (first[name] + before[name]) / 2, atol=1e-7)
    code, out, err = said(
        capsys, "export", f"--base={base}", f"--merge={paths['difference']}*0.25", f"--merge={paths['lora']}*0.25",
        "--format=delta", "--dtype=float32", f"--output={tmp_path / 'sum.safetensors'}",
    )  # fmt: skip
    assert (code, err) == (0, "") and out.startswith("merged 2 parts: ") and "verified: " in out
    for name, value in api.opened(loaded, tmp_path / "sum.safetensors").edits.items():
        np.testing.assert_allclose(value, (first[name] + before[name]) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format=lora"], [".safetensors file"]),
        (["--format=folder", "--output=x.safetensors"], ["give a folder"]),
        (["--format=nothing"], ["--format=nothing is unknown", "kohya"]),
        (["--merge=x*a"], ["strength=a is no number"]),
    ],
)
def test_wrong_commands_end_in_one_line(run, flags, words, tmp_path, capsys):
    base = [] if "--merge" not in flags[0] else [f"--base={run[1].provenance.folder}"]
    first = [f"--run={run[0]}"] if not base else []
    code, out, err = said(capsys, "export", *first, *base, f"--output={tmp_path / 'x'}", *flags)
    assert code == 2 and out == "" and err.count("\n") == 1 and all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


def test_erase_exports_what_it_is_asked_for(run, tmp_path, capsys):
    fields = {**FIELDS, "steps": 1, "base": run[1].provenance.folder, "concept": "dog", "output_dir": tmp_path / "run"}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    code, out, err = said(capsys, "erase", "--config=esd_x", "--export=delta,rar", *flags)
    assert code == 2 and "--export=rar is unknown" in err and not (tmp_path / "run").exists()
    code, out, _ = said(capsys, "erase", "--config=esd_x", "--export=delta,kohya", "--nopictures", *flags)
    assert code == 0 and out.count("verified: ") == 2
    names = {path.name for path in (tmp_path / "run" / "exports").iterdir()}
    assert names == {"sd1-without-dog-delta.safetensors", "sd1-without-dog-lora-kohya.safetensors"}
