"""Textual inversion against torch: the whole table under AdamW, all rows but the new ones put back after every step."""

import copy
import dataclasses
from functools import partial

import esd_oracle
import factories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle
from ablating_world import Studio, small
from esd_world import CONTEXT, SCHEDULE, SHAPE, world
from esd_world import tools as world_tools
from factories import make_tokenizer
from messages import one_line
from torch_oracle import exactly, to_nchw
from words import BOTH, CLIP, NEW, VOCAB, VOCABULARY, text_encoders, tokens

import esd_jax
from esd_jax.erasing import textual_inversion
from esd_jax.erasing.textual_inversion import (
    TABLE,
    Encoder,
    TextualInversion,
    condition,
    initial,
    inverter,
    place,
    words,
)
from esd_jax.families import SD
from esd_jax.methods.forget_me_not import ForgetMeNot
from esd_jax.models.clip import CLIPTextConfig, CLIPTextModel
from esd_jax.models.unet import Conditioning
from esd_jax.params import component, functional
from esd_jax.params import initial as initial_params
from esd_jax.text import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers with numpy 2


def test_five_steps_equal_torch(monkeypatch):
    torch_oracle.exact_sinusoid(monkeypatch)
    settings = TextualInversion(steps=5, learning_rate=2e-3, batch_size=2)
    rng = np.random.default_rng(0)
    with exactly("float64"):
        w = world("unet", "float64")
        encoder, network, params, new = text_encoders()
        latents = jnp.asarray(rng.standard_normal((3, *SHAPE)))
        templates = ("a {concept}", "{concept} of the cat", "the {concept}")
        ids = jnp.asarray([place(tokens, template, [VOCAB, VOCAB + 1]) for template in templates])
        unet_params = component(w.teacher, "unet")
        key = jax.random.key(3)
        run = inverter(settings, w.network, Encoder(network, condition(SD.encode)), SCHEDULE)
        actual, losses = run(unet_params, params, latents, ids, new, key)
        draws = [
            textual_inversion.draw(jax.random.fold_in(key, i), 2, SCHEDULE, latents) for i in range(settings.steps)
        ]
        assert network.shapes[TABLE].shape == (VOCAB, CONTEXT)

    table = encoder.get_input_embeddings().weight.requires_grad_(True)
    adamw = torch.optim.AdamW([table], lr=2e-3, weight_decay=0.1)
    before = table.detach().clone()
    for (image, t, noise), ours in zip(draws, losses, strict=True):
        t, noise = torch.tensor(np.asarray(t)), to_nchw(noise)
        a = esd_oracle.ALPHA_BAR[t][:, None, None, None]
        x = a.sqrt() * to_nchw(np.asarray(latents)[np.asarray(image)]) + (1 - a).sqrt() * noise
        hidden = encoder(torch.tensor(np.asarray(ids)[np.asarray(image)]).long()).last_hidden_state
        loss = torch.nn.functional.mse_loss(w.models.teacher(x, t, hidden).sample, noise)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        with torch.no_grad():
            for row in range(VOCAB, VOCAB + NEW):
                norm = table[row].norm()
                table[row] *= (norm + min(1, 100 * 2e-3) * (0.4 - norm)) / norm
            table[:VOCAB] = before[:VOCAB]
        assert float(ours) == pytest.approx(loss.item(), rel=1e-9)
    change = (table - before)[VOCAB:].detach().numpy()
    assert np.linalg.norm(np.asarray(actual) - table[VOCAB:].detach().numpy()) <= 1e-5 * np.linalg.norm(change)
    assert len({int(i) for d in draws for i in d[0]}) > 1


def test_new_tokens_are_encoded_as_if_they_were_in_the_table():
    with exactly("float64"):
        encoder, network, params, new = text_encoders()
        ids = place(tokens, "a {concept} of {concept}", [VOCAB])[None]
        ours = textual_inversion.encode(Encoder(network, condition(SD.encode)), params, ids, new).embeddings
    assert torch_oracle.error(ours, copy.deepcopy(encoder)(torch.tensor(ids).long()).last_hidden_state) <= 1e-8


def test_norms_are_pulled():
    new = jnp.asarray([[3.0, 4.0], [0.0, 0.4]])
    np.testing.assert_allclose(jnp.linalg.norm(TextualInversion().pull(new), axis=-1), [4.54, 0.4], rtol=1e-6)
    at_once = dataclasses.replace(TextualInversion(), learning_rate=0.1).pull(new)
    np.testing.assert_allclose(at_once, [[0.24, 0.32], [0.0, 0.4]], rtol=1e-6)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_new_tokens_take_the_place_of_the_concept(pad):
    tokenizer = Tokenizer(make_tokenizer(pad_token=pad), 77)
    known = tokenizer(["a photo of cat dog"])[0]
    ids = place(tokenizer, "a photo of {concept}", [1000, 1001])
    assert ids.shape == (77,) and ids.dtype == known.dtype
    where = [*np.flatnonzero(ids >= 1000)]
    assert ids[where].tolist() == [1000, 1001] and (np.delete(ids, where) == np.delete(known, where)).all()
    assert words(tokenizer, "cat dog") == known[where].tolist() and words(tokenizer, "") == []
    with pytest.raises(ValueError, match=one_line("a photo of {concept}", "80 new tokens", "75")):
        place(tokenizer, "a photo of {concept}", range(1000, 1080))


def test_new_tokens_start_from_words_or_noise():
    tokenizer = Tokenizer(make_tokenizer(), 77)
    table = jax.random.normal(jax.random.key(0), (600, 2000))
    new = initial(tokenizer, {TABLE: table}, "cat | <rand-0.5>|<rand-1>", jax.random.key(1))
    np.testing.assert_array_equal(new[0], table[words(tokenizer, "cat")[0]])
    np.testing.assert_allclose(np.std(new[1:], axis=1), [0.5, 1], rtol=0.1)
    assert abs(np.corrcoef(new[1:])[0, 1]) < 0.1
    with pytest.raises(ValueError, match=one_line("'cat dog'", "2")):
        initial(tokenizer, {TABLE: table}, "cat dog", jax.random.key(1))


# As the first stage of Forget-Me-Not

STAGE = {"template": "of {concept} of; the {concept}", "drawn_images": 3, "inversion_steps": 3, "drawing_seed": 5,
         "inversion_learning_rate": 1e-2, "inversion_tokens": "cat|<rand-1>; <rand-1>|clay"}  # fmt: skip


def stage(concepts=BOTH, encoders=1, studio=None, **fields):
    """(tools, what Forget-Me-Not makes) of a tiny text encoder, and of the toy as if it had a cross-attention."""
    w, studio, network = small(), studio or Studio(), functional(lambda: CLIPTextModel(CLIPTextConfig(**CLIP)))
    weights = initial_params(lambda: CLIPTextModel(CLIPTextConfig(**CLIP)))
    unet = dataclasses.replace(w.network, layouts={**w.network.layouts, "a.attn2.to_q.weight": "linear"})
    tools = world_tools(
        w,
        denoiser=unet,
        encode=lambda texts: Conditioning(jax.jit(network.apply)(weights, tokens(texts)).last_hidden_state),
        tokens=tokens,
        sample=studio.sample,
        to_latents=studio.to_latents,
        component="unet",
        params={"unet": component(w.teacher, "unet"), "text_encoder": weights},
        condition=lambda outputs: SD.encode({}, outputs, (0, 0)),
        text_encoders=dict.fromkeys(("text_encoder", "text_encoder_2")[:encoders], network),
    )
    return tools, ForgetMeNot(**{**STAGE, **fields}).make(tools, concepts)


def test_new_tokens_stand_for_the_concept():
    studio = Studio()
    tools, (_, inputs) = stage(studio=studio)
    # Start, "of" or "the", the new tokens, "of" or none, an end, and padding with the end.
    assert [[np.flatnonzero(row).tolist() for row in rows] for rows in inputs.columns] == [[[2, 3, 5], [2, 3, 4]]] * 2
    assert studio.asked[0][0][:3] == ["of a cat of", "the a cat", "of a cat of"]  # images are of what is forgotten

    (network,), params = tools.text_encoders.values(), tools.params["text_encoder"]
    encoder = Encoder(network, condition(SD.encode))
    np.testing.assert_array_equal(inputs.bank.rows.embeddings[:1], tools.encode([""]).embeddings)
    encode = jax.jit(partial(textual_inversion.encode, encoder))
    assert inputs.bank.roles["concept"].tolist() == [[1, 2], [3, 4]]
    run = inverter(TextualInversion(3, 1e-2), tools.denoiser, encoder, tools.schedule)
    ids = np.array([[0, 4, 9, 10, 4, 1, 1], [0, 7, 9, 10, 1, 1, 1]])
    for i, starts in enumerate(STAGE["inversion_tokens"].split(";")):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(5), i))
        new = initial(tokens, params, starts, keys[0])
        np.testing.assert_array_equal(new[i], params[TABLE][VOCABULARY[["cat", "clay"][i]]])
        learned, _ = run(tools.params["unet"], params, inputs.images[i], ids[[0, 1, 0]], new, keys[1])
        assert np.abs(learned - new).max() > 0.01
        rows = inputs.bank.rows.embeddings[inputs.bank.roles["concept"][i]]
        np.testing.assert_allclose(rows, encode(params, ids, learned).embeddings, rtol=1e-4, atol=1e-5)
        assert np.abs(rows - encode(params, ids, new).embeddings).max() > 0.01


def test_one_start_serves_all_concepts_and_ends_may_be_left_alone():
    _, (_, inputs) = stage(inversion_tokens="cat", eos_positions="none")
    assert [[np.flatnonzero(row).tolist() for row in rows] for rows in inputs.columns] == [[[2], [2]]] * 2


def test_what_cannot_be_inverted_is_refused_before_images_are_drawn(tmp_path):
    studio = Studio()
    for fields, message in [
        ({"encoders": 2}, ["inversion_steps=3", "one text encoder", "this one has 2", "SDXL"]),
        ({"inversion_tokens": "a;of;the"}, ["inversion_tokens='a;of;the'", "3 parts for 2 concepts"]),
        ({"inversion_tokens": "a photo"}, ["one token", "'a photo' has 2"]),
        ({"inversion_tokens": "a|of|the|of"}, ["template 'of {concept} of' with 4 new tokens", "5 tokens"]),
    ]:
        with pytest.raises(ValueError, match=one_line(*message)):
            stage(studio=studio, **fields)
    assert not studio.asked
    factories.make_sdxl(tmp_path / "sdxl")
    fields = {"method": "forget_me_not", "inversion_steps": 5, "steps": 1}
    with pytest.raises(ValueError, match=one_line("inversion_steps=5", "one text encoder", "SDXL")):
        esd_jax.erase(tmp_path / "sdxl", "cat", **fields)
