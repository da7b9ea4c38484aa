"""Textual-inversion embeddings, and folders whose text encoder has learned words, against diffusers."""

import factories
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from messages import one_line
from paths import DATA

import esd_jax
from esd_jax import exports
from esd_jax.diffusion import prompt_to_prompt
from esd_jax.io.embeddings import add_embedding
from esd_jax.text import PromptTruncated

MAKE = {"sd1": factories.make_sd1, "sdxl": factories.make_sdxl}
PROMPTS = ["a photo of <toy>", "<toy> and a dog", "a cat"]


@pytest.fixture(scope="module", params=MAKE)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, MAKE[request.param](folder), request.param


def vectors(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, factories.WIDTH)).astype(np.float32)


@torch.no_grad()
def encoded(pipe):
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    actual = pipe.encode_prompt(PROMPTS, **options)
    return actual[0].numpy(), None if len(actual) == 2 else actual[2].numpy()


@pytest.mark.parametrize("count", [1, 3])
def test_a_word_is_encoded_as_diffusers_encodes_it(family, count, tmp_path):
    folder, _, kind = family
    pipe = type(family[1]).from_pretrained(folder)
    if kind == "sd1":
        safetensors.numpy.save_file({"emb_params": vectors(count)}, tmp_path / "toy.safetensors")
        pipe.load_textual_inversion(tmp_path / "toy.safetensors", token="<toy>")
    else:
        both = {"clip_l": vectors(count), "clip_g": vectors(count, 1)}
        safetensors.numpy.save_file(both, tmp_path / "toy.safetensors")
        for key, name in (("clip_l", ""), ("clip_g", "_2")):
            pipe.load_textual_inversion(
                torch.from_numpy(both[key]), token="<toy>",
                text_encoder=getattr(pipe, "text_encoder" + name), tokenizer=getattr(pipe, "tokenizer" + name),
            )  # fmt: skip
    base = esd_jax.load(folder)
    taught = add_embedding(base, tmp_path / "toy.safetensors", "<toy>")
    embeddings, pooled = encoded(pipe)
    ours = taught.encode_prompts(PROMPTS)
    np.testing.assert_allclose(ours.embeddings, embeddings, atol=2e-5)
    if pooled is not None:
        np.testing.assert_allclose(ours.pooled, pooled, atol=2e-5)
    before = base.encode_prompts(PROMPTS)
    assert np.abs(ours.embeddings[0] - before.embeddings[0]).max() > 0.1
    np.testing.assert_array_equal(ours.embeddings[2], before.embeddings[2])
    # The same from a folder that diffusers saves with it.
    pipe.save_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(esd_jax.load(tmp_path / "saved").encode_prompts(PROMPTS).embeddings, ours.embeddings)
    saved = esd_jax.export(esd_jax.load(tmp_path / "saved"), tmp_path / "again")
    reopened = type(pipe).from_pretrained(saved)
    np.testing.assert_array_equal(encoded(reopened)[0], embeddings)


@pytest.mark.slow
def test_a_learned_word_is_erased_and_exported_without_the_text_encoder(tmp_path):
    factories.make_sd1(tmp_path / "base")
    safetensors.numpy.save_file({"<toy>": vectors(2)}, tmp_path / "learned.safetensors")
    base = add_embedding(esd_jax.load(tmp_path / "base"), tmp_path / "learned.safetensors")
    fields = {"steps": 1, "sampling_steps": 2, "timestep_mode": "grid", "dtype": "float32"}
    with pytest.raises(ValueError, match=one_line("text_encoder", "embedding", "diffusers")):
        esd_jax.erase(base, "<toy>", output_dir=tmp_path / "run", **fields)
    erased = esd_jax.erase(base, "<toy>", **fields)
    for format in ("folder", "single"):
        with pytest.raises(ValueError, match=one_line("text_encoder", "embedding", "delta")):
            exports.export(erased, tmp_path / f"x{exports.FORMATS[format].ending}", format)
    for format in ("delta", "difference", "lora"):
        exports.export(erased, tmp_path / f"{format}.safetensors", format, verify=True)
    assert not (tmp_path / "run").exists() and not (tmp_path / "x").exists()


def taught(base, folder, *words):
    """The base with words, each of as many vectors as it has after its colon."""
    for seed, word in enumerate(words):
        name, count = word.split(":")
        safetensors.numpy.save_file({"emb_params": vectors(int(count), seed)}, folder / "x.safetensors")
        base = add_embedding(base, folder / "x.safetensors", name)
    return base


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    factories.make_sd1(folder := tmp_path_factory.mktemp("plain"))
    return esd_jax.load(folder)


@pytest.mark.parametrize("order", [("toy:2", "toy-blue:3"), ("toy-blue:3", "toy:2")])
def test_a_word_within_another_is_that_other(plain, order, tmp_path):
    words = taught(plain, tmp_path, *order).tokenizers[0].words
    first = {word.split(":")[0]: words(word.split(":")[0]) for word in order}
    assert sorted(first["toy"] + first["toy-blue"]) == [factories.VOCAB_SIZE + i for i in range(5)]
    a, comma = plain.tokenizers[0].words("a"), plain.tokenizers[0].words(",")
    assert words("a toy-blue, toy") == [*a, *first["toy-blue"], *comma, *first["toy"]]
    assert words("toytoy-blue") == [*first["toy"], *first["toy-blue"]]


def test_a_word_has_all_its_vectors_however_it_is_written(plain, tmp_path):
    tokenizer = taught(plain, tmp_path, "MyStyle:2").tokenizers[0]
    assert tokenizer.words("mystyle") == tokenizer.words("MyStyle") == [factories.VOCAB_SIZE, factories.VOCAB_SIZE + 1]
    with pytest.warns(PromptTruncated, match="too long"):
        (ids,) = tokenizer(["mystyle " * 40])
    assert list(ids[1:76]) == [factories.VOCAB_SIZE + i % 2 for i in range(75)] and ids[76] == factories.VOCAB_SIZE - 1
    scale = prompt_to_prompt.token_scale(tokenizer, ["a mystyle cat"], {"MyStyle": 3.0, "cat": 2.0})
    assert scale[0, 1:6].tolist() == [1, 3, 3, 2, 1]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (" toy", "a space"),
        ("toy ", "a space"),
        (" ", "a space"),
        ("MYSTYLE", "a word that it knows"),
        ("\udce9", "UTF-8"),
    ],
)
def test_words_that_cannot_be_learned(plain, tmp_path, word, said):
    base = taught(plain, tmp_path, "MyStyle:2")
    with pytest.raises(ValueError, match=one_line("x.safetensors", repr(word), said)):
        add_embedding(base, tmp_path / "x.safetensors", word)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"emb_params": (2, 7)}, ["widths", "32"]),
        ({"emb_params": (0, 32)}, ["no embedding"]),
        ({"clip_l": (2, 32), "clip_g": (2, 32)}, ["no embedding for this checkpoint"]),
        ({"a": (2, 32), "b": (2, 32)}, ["2 words ('a', 'b')", "one word"]),
        ({"unet.conv_in.lora_A.weight": (2, 32), "a": (2, 32)}, ["no key of a textual-inversion", "LoRA", "merge"]),
        ({"lora_te_x.lora_down.weight": (2, 32)}, ["no key of a textual-inversion", "LoRA", "merge"]),
        ({"cat</w>": (1, 32)}, ["knows 'cat</w>' already"]),
    ],
)
def test_files_that_are_refused(content, words, tmp_path):
    factories.make_sd1(tmp_path / "base")
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({key: np.ones(shape, np.float32) for key, shape in content.items()}, file)
    with pytest.raises(ValueError, match=one_line(file, *words)):
        add_embedding(esd_jax.load(tmp_path / "base"), file)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sdxl", ["one of SDXL's, for two text encoders", "(2, 1280)", "{'text_encoder': 128}"]),
        ("two_words", ["2 words ('<a>', '<b>')", "a file of one word"]),
        ("wrong_width", ["no embedding for this checkpoint", "(2, 768)", "{'text_encoder': 128}"]),
    ],
)
def test_samples_that_the_embedded_model_cannot_use(name, words):
    file = DATA / "embeddings" / f"{name}.safetensors"
    with pytest.raises(ValueError, match=one_line(file, *words)):
        add_embedding(esd_jax.load("emoji"), file)


@pytest.mark.parametrize("name", ["learned_embeds.bin", "a1111.pt"])
def test_the_advice_on_a_pickle_makes_what_is_read(name, tmp_path):
    factories.make_sd1(tmp_path / "base")
    base, rows = esd_jax.load(tmp_path / "base"), torch.from_numpy(vectors(2))
    torch.save({"<toy>": rows} if name.endswith(".bin") else {"string_to_param": {"*": rows}}, tmp_path / name)
    with pytest.raises(ValueError, match=one_line(name, "pickle", "never read", "save_file", "emb_params")) as error:
        add_embedding(base, tmp_path / name)
    load, _, save = str(error.value).partition("first (")[2].removesuffix(")").partition(", then ")
    new = tmp_path / "new.safetensors"
    code = f"{load}\n{save}".replace("OLD", repr(str(tmp_path / name))).replace("NEW", repr(str(new)))
    exec(code, {"torch": torch, "safetensors": safetensors})
    table = add_embedding(base, new, "<toy>").params["text_encoder"]["embeddings.token_embedding.weight"]
    np.testing.assert_array_equal(table[-2:], rows)
