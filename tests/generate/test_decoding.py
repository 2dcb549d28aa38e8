"""The decoding loop: the tokens are the model's, the expert counts are those of a plain forward, the text is whole."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_checkpoint import byte_tokenizer
from helpers.transformers_tiny import tiny_model
from zemoe.generate.decoding import Generation, Sampling, TextStream, Token, draw, generate
from zemoe.integrations.transformers import patch_

PROMPT = [5, 9, 23, 40, 41]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    patch_(model)
    return model


def run(model, prompt=PROMPT, sampling=GREEDY, most=20) -> Generation:
    made = Generation()
    assert list(generate(model, prompt, sampling, most, made)) == made.tokens
    return made


def test_greedy_is_the_models_own(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # transformers' for a name that it has given up
        made = run(model)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert [token.id for token in made.tokens] == expected[0, len(PROMPT) :].tolist()
    assert made.finish == "length"
    assert made.prompt_seconds > 0 and made.decode_seconds > 0


def test_experts_are_those_of_one_plain_forward(model):
    """Counted from the routers' own outputs over the whole text, without cache and without zemoe.observe."""
    made = run(model, sampling=Sampling(seed=3))
    ids = PROMPT + [token.id for token in made.tokens]
    counts: list[torch.Tensor] = []

    def count(module, args, routing):
        counts.append((routing.topk_ids_TK < model.config.n_routed_experts).sum(-1))

    hooks = [layer.mlp.router.register_forward_hook(count) for layer in model.model.layers]
    model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    expected = torch.stack(counts, dim=1).tolist()
    assert len({tuple(row) for row in expected}) > 3, "too uniform to tell right from wrong"
    assert [list(token.ffn_by_layer) for token in made.prompt + made.tokens] == expected
    assert made.tokens[0].ffn_experts == sum(expected[len(PROMPT)])
    generated = torch.tensor(expected[len(PROMPT) :], dtype=torch.float64)
    assert made.mean_ffn_by_layer == pytest.approx(generated.mean(0).tolist())


def test_seeds(model):
    first, again, other = (run(model, sampling=Sampling(seed=seed)).tokens for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_it_ends_where_the_model_ends(model, monkeypatch):
    tokens = [token.id for token in run(model).tokens]
    end = tokens[7]
    for value in (end, [95, end]):
        monkeypatch.setattr(model.generation_config, "eos_token_id", value)
        made = run(model)
        assert [token.id for token in made.tokens] == tokens[: tokens.index(end)]
        assert made.finish == "end"


def test_it_ends_with_the_context(model):
    limit = model.config.max_position_embeddings
    made = run(model, most=1000)
    assert (len(made.tokens), made.finish) == (limit - len(PROMPT), "context")


def test_what_was_made_is_true_at_any_moment(model):
    made = Generation()
    steps = generate(model, PROMPT, GREEDY, 20, made)
    assert made.mean_ffn_by_layer == []
    seen = [next(steps), next(steps)]
    steps.close()
    assert made.tokens == seen and len(made.prompt) == len(PROMPT) and made.finish is None
    assert made.mean_ffn_by_layer == [sum(used) / 2 for used in zip(*(t.ffn_by_layer for t in seen), strict=True)]


def test_nothing_stays_on_the_model(model):
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    run(model, most=2)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == before


# ---------------------------------------------------------------------------------------------------------- drawing


def drawn(logits, times=2000, **how) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    ids = [draw(torch.tensor(logits), Sampling(**how), generator) for _ in range(times)]
    return {i: ids.count(i) / times for i in sorted(set(ids))}


def test_temperature():
    logits = [0.0, 2.0, 1.0]
    assert drawn(logits, temperature=0.0) == {1: 1.0}
    assert drawn(logits, temperature=1e-320) == {1: 1.0}
    for temperature in (1.0, 0.5):
        expected = (torch.tensor(logits) / temperature).softmax(0).tolist()
        shares = drawn(logits, temperature=temperature, top_p=1.0)
        assert [shares.get(i, 0.0) for i in range(3)] == pytest.approx(expected, abs=0.04)


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().tolist()
    assert set(drawn(logits, temperature=1.0, top_p=0.49)) == {1}
    assert set(drawn(logits, temperature=1.0, top_p=0.6)) == {1, 2}
    assert set(drawn(logits, temperature=1.0, top_p=1.0)) == {0, 1, 2, 3}
    shares = drawn(logits, temperature=1.0, top_p=0.6)
    assert shares[1] == pytest.approx(2 / 3, abs=0.04)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_named(bad):
    with pytest.raises(ValueError, match="not finite"):
        drawn([0.0, bad])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.01}, "top_p must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**63}, "seed must be"),
    ],
)
def test_bad_sampling(how, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**how)


# ------------------------------------------------------------------------------------------------------------- text


TOKENIZER = byte_tokenizer()
TEXTS = st.text(max_size=30).map(lambda text: TOKENIZER.encode(text).ids)


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(
        st.text(max_size=30).map(lambda text: TOKENIZER.encode(text).ids), st.lists(st.integers(0, 274), max_size=40)
    )
)
def test_pieces_make_the_whole(ids):
    """Of any ids: of text, and of bytes that are no text."""
    stream = TextStream(TOKENIZER.decode)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.rest() == TOKENIZER.decode(ids)


def test_a_character_comes_when_it_is_complete():
    ids = TOKENIZER.encode("a€😀b").ids
    assert len(ids) == 1 + 3 + 4 + 1
    stream = TextStream(TOKENIZER.decode)
    assert [stream.push(token_id) for token_id in ids] == ["a", "", "", "€", "", "", "", "😀", "b"]
    for token_id in TOKENIZER.encode("€").ids[:2]:
        assert stream.push(token_id) == ""
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"
    assert stream.rest() == ""


def test_token_counts_all_layers():
    assert Token(3, (2, 0, 4)).ffn_experts == 6
