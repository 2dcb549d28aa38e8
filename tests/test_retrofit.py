"""retrofit_: zero experts for trained transformers models; what they compute is restated here as loops in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import zemoe
from helpers.judge import assert_bitwise, one_thread
from zemoe import observe
from zemoe.integrations.transformers.retrofit import retrofit_, unretrofit_
from zemoe.retrofit import ZeroExpertBlock, new_router_rows, zero_experts_disabled


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    """Threads cost more than they give at these sizes."""
    with one_thread():
        yield


E, Z, K, H = 5, 4, 3, 32
SIZES = {
    "vocab_size": 48,
    "hidden_size": H,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": K,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # wide, so that experts matter
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def qwen3(**changes):
    sizes = {**SIZES, "head_dim": 16, "num_experts": E, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **changes}))


def mixtral(**changes):
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_local_experts": E, **changes}))


def deepseek(config=DeepseekV3Config, model=DeepseekV3ForCausalLM, **changes):
    sizes = {
        **SIZES,
        "n_routed_experts": E,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,  # and so one dense layer
        "mlp_layer_types": ["dense", "sparse", "sparse"],  # the same for GLM
        "num_hidden_layers": 3,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    return model(config(**{**sizes, **changes}))


BUILD = {
    "qwen3": qwen3,
    "qwen3, not normalised": lambda: qwen3(norm_topk_prob=False),
    "mixtral": mixtral,
    "deepseek": deepseek,
    "deepseek, not normalised": lambda: deepseek(norm_topk_prob=False),
    "glm": lambda: deepseek(Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
}


def build(name: str):
    """A tiny model with random weights, in evaluation mode; DeepSeek's has a selection bias that matters."""
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    generator = torch.Generator().manual_seed(1)
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "e_score_correction_bias" in key:
            tensor.data.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        elif key.endswith("gate.weight"):
            tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def ids(seed: int = 2, shape: tuple[int, int] = (2, 11)) -> torch.Tensor:
    return torch.randint(0, 48, shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blocks_of(model) -> dict[str, ZeroExpertBlock]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ZeroExpertBlock)}


every_model = pytest.mark.parametrize("name", BUILD)


class TestDisabled:
    @every_model
    def test_the_output_is_the_original_one_to_the_bit(self, name):
        model = build(name)
        expected = model(ids()).logits
        state = {key: value.clone() for key, value in model.state_dict().items()}
        layers = retrofit_(model, Z, generator=seeded())
        assert len(layers) == 2 and all(name.endswith(".mlp") for name in layers)
        with zero_experts_disabled(model):
            assert_bitwise(model(ids()).logits, expected)
        assert (model(ids()).logits - expected).abs().max() > 1e-2, "enabled, they matter"
        for key, value in state.items():
            assert_bitwise(model.state_dict()[key], value)

    @every_model
    def test_zero_rows_that_are_never_chosen(self, name):
        """Enabled, but out of reach: our routing and our experts compute what the model's own do."""
        model = build(name)
        expected = model(ids()).logits
        retrofit_(model, Z, generator=seeded())
        for block in blocks_of(model).values():
            block.selector.register_forward_pre_hook(  # the zero rows' logits become -inf, which masks them
                lambda module, args: (
                    torch.cat([args[0][:, :E], torch.full_like(args[0][:, E:], -torch.inf)], 1),
                    *args[1:],
                )
            )
        with observe(model) as seen:
            out = model(ids()).logits
        assert all((routing.topk_ids_TK < E).all() for routing in seen.values())
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

    def test_nests_and_restores(self):
        model = build("qwen3")
        retrofit_(model, Z)
        block = next(iter(blocks_of(model).values()))
        with zero_experts_disabled(model):
            with pytest.raises(ZeroDivisionError), zero_experts_disabled(model):
                raise ZeroDivisionError
            assert not block.zero_experts_enabled
        assert block.zero_experts_enabled
        with pytest.raises(ValueError, match=r"retrofit_.*Linear"), zero_experts_disabled(torch.nn.Linear(2, 2)):
            pass

    @every_model
    def test_undone(self, name):
        model = build(name)
        expected, keys = model(ids()).logits, list(model.state_dict())
        kinds = [type(module) for module in model.modules()]
        attributes = [set(vars(module)) for module in model.modules()]
        layers = retrofit_(model, Z)
        assert unretrofit_(model) == layers and unretrofit_(model) == ()
        assert [type(module) for module in model.modules()] == kinds and list(model.state_dict()) == keys
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert_bitwise(model(ids()).logits, expected)


def restated(block, x_TH: torch.Tensor, kind: str, bias_E: torch.Tensor):
    """The block in float64 from its parameters: (output, ids as sets, FFN experts a token)."""
    w = {key: value.detach().double() for key, value in block.state_dict().items()}
    gate = block.gate
    sigmoid = hasattr(gate, "routed_scaling_factor")
    outputs, chosen = [], []
    for x in x_TH.double():
        logits = torch.stack([row @ x for row in (*w["gate.weight"], *w["zero_weight"])])
        scores = 1 / (1 + torch.exp(-logits)) if sigmoid else torch.exp(logits) / torch.exp(logits).sum()
        choice = [(scores[i] + (bias_E[i].double() if i < E else 0)).item() for i in range(E + Z)]
        picked = sorted(range(E + Z), key=lambda i: -choice[i])[:K]
        weight = {i: scores[i] for i in picked}
        if getattr(gate, "norm_topk_prob", True):
            weight = {i: value / sum(scores[j] for j in picked) for i, value in weight.items()}
        y = torch.zeros(H, dtype=torch.float64)
        for i in picked:
            scaled = weight[i] * (gate.routed_scaling_factor if sigmoid else 1)
            if i < E:
                g, up = (w["experts.gate_up_proj"][i] @ x).chunk(2)
                y = y + scaled * (w["experts.down_proj"][i] @ (g / (1 + torch.exp(-g)) * up))
            elif kind == "identity":
                y = y + scaled * x
        if "shared_experts.gate_proj.weight" in w:
            g, up = w["shared_experts.gate_proj.weight"] @ x, w["shared_experts.up_proj.weight"] @ x
            y = y + w["shared_experts.down_proj.weight"] @ (g / (1 + torch.exp(-g)) * up)
        outputs.append(y)
        chosen.append(set(picked))
    return torch.stack(outputs), chosen


class TestEnabled:
    @pytest.mark.parametrize("kind", ["zero", "identity"])
    @every_model
    def test_against_loops(self, name, kind):
        model = build(name)
        retrofit_(model, Z, zero_expert_type=kind, generator=seeded())
        x = torch.randn(2, 12, H, generator=seeded(5))
        for block in blocks_of(model).values():
            bias = block.e_score_correction_bias
            if "mlp.gate.e_score" not in " ".join(model.state_dict()):
                bias.copy_(0.05 * torch.randn(E, generator=seeded(6)))
            with observe(block) as seen:
                out = block(x)
            expected, chosen = restated(block, x.view(-1, H), kind, bias)
            (routing,) = seen.values()
            assert [set(row) for row in routing.topk_ids_TK.tolist()] == chosen
            torch.testing.assert_close(out.view(-1, H).double(), expected, rtol=1e-4, atol=1e-4)
            zero = (routing.topk_ids_TK >= E).float().mean().item()
            assert 0.1 < zero < 0.9 and out.dtype == torch.float32
            assert routing.logits_TA.shape == (24, E + Z)

    @every_model
    def test_observed_under_the_blocks_name(self, name):
        model = build(name)
        layers = retrofit_(model, Z, generator=seeded())
        with observe(model) as seen:
            model(ids())
        assert tuple(seen.layers()) == layers
        for layer in layers:
            assert model.get_submodule(layer).e_score_correction_bias.shape == (E,)

    def test_more_choices(self):
        model = build("qwen3")
        retrofit_(model, Z, top_k=7, generator=seeded())
        with observe(model) as seen:
            model(ids())
        assert all(routing.topk_ids_TK.shape[1] == 7 for routing in seen.values())

    @every_model
    def test_it_trains(self, name):
        """A few steps of LM loss, ZEDA's loss and a bias controller, under activation checkpointing or not."""
        model = build(name).train()
        layers = retrofit_(model, Z, generator=seeded())
        if name == "mixtral":
            for layer in model.model.layers:  # activation checkpointing
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        rows = [model.get_submodule(layer).zero_weight for layer in layers]
        before = [row.detach().clone() for row in rows]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scoring = model.get_submodule(layers[0]).rules.scoring_func
        losses = []
        for _ in range(6):
            tally = zemoe.statistics.RoutingTally(E)
            with observe(model) as seen:
                loss = model(ids(), labels=ids(), use_cache=False).loss
                balance = sum(
                    zemoe.balance.zeda_balance_loss(routing, num_experts=E, zero_weight=1.0, scoring_func=scoring)
                    for routing in seen.values()
                )
                optimizer.zero_grad()
                (loss + 0.01 * balance).backward()
            optimizer.step()
            tally.add(seen)
            for layer, counts in tally.counts.items():
                bias = model.get_submodule(layer).e_score_correction_bias
                zemoe.balance.update_longcat_bias_(
                    bias, counts, num_experts=E, top_k=K, ffn_experts_per_token=2.0, rate=0.1
                )
            losses.append(loss.item())
            assert all(entry.tokens == ids().numel() for entry in tally.statistics().layers.values())
        assert losses[-1] < losses[0] - 0.5
        for row, old in zip(rows, before, strict=True):
            assert (row.detach() - old).abs().max() > 1e-3
        for layer in layers:
            assert model.get_submodule(layer).e_score_correction_bias.abs().sum() > 0

    @every_model
    def test_state_dict_goes_round(self, name, tmp_path):
        model = build(name)
        layers = retrofit_(model, Z, generator=seeded())
        block = model.get_submodule(layers[0])
        block.e_score_correction_bias.add_(torch.linspace(-0.1, 0.1, E))
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = BUILD[name]().eval()
        retrofit_(other, Z)
        assert not torch.equal(other(ids()).logits, model(ids()).logits)
        assert str(other.load_state_dict(torch.load(tmp_path / "state.pt"))) == "<All keys matched successfully>"
        assert_bitwise(other(ids()).logits, model(ids()).logits)

    @pytest.mark.parametrize("name", ["qwen3", "mixtral", "deepseek"])
    def test_copies(self, name):
        """Deep copies and pickles, also of a block alone, are models of their own."""
        model = build(name)
        retrofit_(model, Z, generator=seeded())
        expected = model(ids()).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_bitwise(other(ids()).logits, expected)
            with zero_experts_disabled(other):
                assert_bitwise(model(ids()).logits, expected)

    def test_bfloat16(self):
        model = build("deepseek").to(torch.bfloat16)
        expected = model(ids()).logits
        retrofit_(model, Z, generator=seeded())
        assert all(block.zero_weight.dtype == torch.bfloat16 for block in blocks_of(model).values())
        with zero_experts_disabled(model):
            assert_bitwise(model(ids()).logits, expected)
        with observe(model) as seen:
            assert model(ids()).logits.dtype == torch.bfloat16
        assert all(routing.logits_TA.dtype == torch.float32 for routing in seen.values())

    def test_generates(self):
        model = build("qwen3")
        retrofit_(model, Z, generator=seeded())
        out = model.generate(ids(shape=(1, 4)), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert out.shape == (1, 7)

    def test_a_checkpointed_block(self):
        model = build("deepseek")
        layers = retrofit_(model, Z, generator=seeded())
        block, x = model.get_submodule(layers[0]), torch.randn(1, 9, H, generator=seeded(5))
        grads = []
        for wrapped in (False, True):
            block.zero_grad()
            out = checkpoint(block, x, use_reentrant=False) if wrapped else block(x)
            out.square().sum().backward()
            grads.append([block.zero_weight.grad, block.gate.weight.grad, block.experts.down_proj.grad])
        for plain, recomputed in zip(*grads, strict=True):
            assert_bitwise(recomputed, plain)
        assert grads[0][0].abs().sum() > 0


class TestNewRows:
    def test_mean_and_deviation_of_each_column(self):
        weight = torch.randn(6, 4, generator=seeded()) * torch.tensor([0.1, 1, 5, 0]) + torch.tensor([3.0, 0, -2, 7])
        rows = new_router_rows(weight, 20000, seeded(1))
        torch.testing.assert_close(rows.mean(0), weight.mean(0), rtol=0.02, atol=0.1)
        torch.testing.assert_close(rows.std(0), weight.std(0, correction=0), rtol=0.03, atol=1e-6)
        assert (rows[:, 3] == 7).all()
        assert abs(torch.corrcoef(rows[:, :3].T)[0, 1]) < 0.05

    def test_a_generator_repeats_them(self):
        weight = torch.randn(6, 4, generator=seeded())
        assert_bitwise(new_router_rows(weight, 3, seeded(1)), new_router_rows(weight, 3, seeded(1)))
        assert not torch.equal(new_router_rows(weight, 3, seeded(1)), new_router_rows(weight, 3, seeded(2)))
        assert new_router_rows(weight[:1], 3, seeded()).eq(weight[:1]).all()
        assert new_router_rows(weight.bfloat16(), 3).dtype == torch.bfloat16

    def test_in_a_model(self):
        first, second = build("qwen3"), build("qwen3")
        for model in (first, second):
            retrofit_(model, 2, generator=seeded())
        rows = [[block.zero_weight for block in blocks_of(model).values()] for model in (first, second)]
        for a, b in zip(*rows, strict=True):
            assert_bitwise(a, b)
        assert not torch.equal(*rows[0])


def snapshot(model):
    return (
        [type(module) for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        {key: value.clone() for key, value in model.state_dict().items()},
    )


def assert_unchanged(model, before) -> None:
    kinds, attributes, state = snapshot(model)
    assert kinds == before[0] and attributes == before[1] and state.keys() == before[2].keys()
    for key, value in state.items():
        assert_bitwise(value, before[2][key])


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "arguments", "words"),
        [
            ("qwen3", {"num_zero_experts": 0}, ["num_zero_experts", "0"]),
            ("qwen3", {"num_zero_experts": 2, "zero_expert_type": "constant"}, ["zero_expert_type", "constant"]),
            ("qwen3", {"num_zero_experts": 2, "top_k": 8}, ["model.layers.0.mlp", "top_k", "8", "7"]),
            (lambda: mixtral(router_jitter_noise=0.1), {"num_zero_experts": 2}, ["router_jitter_noise", "0.1"]),
            (lambda: mixtral(hidden_act="relu"), {"num_zero_experts": 2}, ["hidden_act", "silu"]),
            (lambda: mixtral(output_router_logits=True), {"num_zero_experts": 2}, ["output_router_logits"]),
            (
                lambda: deepseek(n_routed_experts=8, n_group=4, topk_group=2),
                {"num_zero_experts": 2},
                ["n_group", "4", "model.layers.1.mlp"],
            ),
            (
                lambda: LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SIZES.items() if k != "num_experts_per_tok"})),
                {"num_zero_experts": 2},
                ["Qwen3MoeSparseMoeBlock", "LlamaForCausalLM"],
            ),
        ],
    )
    def test_with_the_reason(self, model, arguments, words):
        model = build(model) if isinstance(model, str) else model()
        before = snapshot(model)
        with pytest.raises(ValueError) as error:
            retrofit_(model, **arguments)
        assert all(word in str(error.value) for word in words), str(error.value)
        assert_unchanged(model, before)

    def test_no_module(self):
        with pytest.raises(TypeError, match=r"model.*str"):
            retrofit_("model", 2)

    def test_twice(self):
        model = build("qwen3")
        retrofit_(model, Z)
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"model.layers.0.mlp.*already.*unretrofit_"):
            retrofit_(model, Z)
        assert_unchanged(model, before)

    def test_wrapped_changed_or_quantized_blocks(self):
        def wrap(block):
            block.experts.forward = block.experts.forward

        def exchange(block):
            block.gate = torch.nn.Linear(H, E)

        def quantize(block):
            weight = block.experts.gate_up_proj.data.to(torch.int8)
            block.experts.gate_up_proj = torch.nn.Parameter(weight, requires_grad=False)

        for change, words in ((wrap, "wrapped"), (exchange, "Linear"), (quantize, "quantized")):
            model = build("qwen3")
            change(model.model.layers[1].mlp)
            before = snapshot(model)
            with pytest.raises(ValueError, match=rf"model.layers.1.mlp.*{words}"):
                retrofit_(model, Z)
            assert_unchanged(model, before)

    @pytest.mark.parametrize("name", ["qwen3", "mixtral", "deepseek"])
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_after_an_exception_nothing_is_half_changed(self, name, error, monkeypatch):
        model = build(name)
        expected, before = model(ids()).logits, snapshot(model)
        real, calls = ZeroExpertBlock.adopt, []

        def adopt(self, *args):
            calls.append(self)
            real(self, *args)
            if len(calls) == 2:
                raise error("no memory")

        monkeypatch.setattr(ZeroExpertBlock, "adopt", adopt)
        with pytest.raises(error, match="no memory"):
            retrofit_(model, Z)
        assert len(calls) == 2
        assert_unchanged(model, before)
        assert_bitwise(model(ids()).logits, expected)

    def test_blocks_are_not_built(self):
        model = build("qwen3")
        retrofit_(model, Z)
        block = next(iter(blocks_of(model).values()))
        with pytest.raises(TypeError, match="retrofit_"):
            type(block)(model.config)
