"""LongCat-Flash with our layers under transformers' Trainer, with LoRA on the experts' packed Parameters."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LongcatFlashForCausalLM, Trainer, TrainingArguments

import zemoe.integrations.transformers as bridge
from helpers import transformers_shared
from helpers.transformers_shared import assert_ours, logits_of

# Fixtures
transformers_is_left_as_it_was = transformers_shared.transformers_is_left_as_it_was
stock = transformers_shared.stock

TOLERANCE = 1e-4  # float32 logits of order 4: a merged weight rounds otherwise than the sum of two products


def trained(base: LongcatFlashForCausalLM, ids: torch.Tensor, folder) -> tuple[PeftModel, list[float]]:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["o_proj", "classifier"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=10,
        per_device_train_batch_size=8,
        learning_rate=3e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    return model.eval(), [step["loss"] for step in map(dict, trainer.state.log_history) if "loss" in step]


def test_lora_on_the_experts_trains_and_merges(stock, tmp_path):
    """Also on the router: a classifier that LoRA wraps takes part, where stock reads past it."""
    ids = torch.randint(3, 96, (8, 12), generator=torch.Generator().manual_seed(0))
    base = copy.deepcopy(stock)
    bridge.patch_(base)
    model, losses = trained(base, ids, tmp_path / "trainer")
    assert losses[-1] < losses[0] - 1
    moved = {name for name, p in model.named_parameters() if "lora_B" in name and p.abs().max() > 1e-3}
    assert sum("experts" in name for name in moved) == 4  # two Parameters in two layers
    assert sum("classifier" in name for name in moved) == 2
    expected = logits_of(model, ids)
    assert (expected - logits_of(base, ids)).abs().max() > 0.5

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again, ids), expected)

    merged = model.merge_and_unload()
    assert_ours(merged)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert (logits_of(merged, ids) - expected).abs().max() < TOLERANCE
    merged.save_pretrained(tmp_path / "merged")
    assert (logits_of(bridge.load_model(tmp_path / "merged"), ids) - expected).abs().max() < TOLERANCE
    bridge.export(merged, tmp_path / "plain")
    plain = LongcatFlashForCausalLM.from_pretrained(tmp_path / "plain")
    assert (logits_of(plain, ids) - expected).abs().max() < TOLERANCE


def test_lora_gradients_are_those_of_stock(stock):
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    config = LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    found = []
    for ours in (False, True):
        model = copy.deepcopy(stock)
        if ours:
            bridge.patch_(model)
        torch.manual_seed(0)
        wrapped = get_peft_model(model, config)
        wrapped(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad})
    expected, computed = found
    assert expected.keys() == computed.keys() and len(expected) == 4
    for name, gradient in computed.items():
        assert (gradient - expected[name]).abs().max() < 1e-4 * expected[name].abs().max(), name
