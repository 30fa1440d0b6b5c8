"""Losses on packed rows are those of their documents, and gradient checkpointing changes none of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from dijiang_convert.errors import DijiangError
from dijiang_convert.training.adapters import lora_targets
from dijiang_convert.training.attention import original
from dijiang_convert.training.attention_transfer import attention_transfer_loss, transfer_attention, transferring
from dijiang_convert.training.logits import cross_entropy_loss, distillation_loss, live_teacher
from dijiang_convert.training.packing import check_packing
from tests.architecture.test_architecture import config_of
from tests.models import KINDS, kernels, load, source, tokens
from tests.sources_on_disk import random_model

ROWS = ((70, 1, 9, 80), (100, 40))  # the second ends in padding
LENGTH = 160


def packed() -> dict[str, Tensor]:
    """A batch as training gets it: the first token of a document is no target."""
    ids = tokens(2, LENGTH)
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in (*row, LENGTH - sum(row))]) for row in ROWS])
    mask = (torch.arange(LENGTH) < torch.tensor([[sum(row)] for row in ROWS])).long()
    targets = mask * (position_ids > 0)
    return {"input_ids": ids, "position_ids": position_ids, "attention_mask": mask, "loss_mask": targets}


def documents() -> dict[str, Tensor]:
    """The same documents, each in a row of its own."""
    batch, lengths = packed(), [n for row in ROWS for n in row]
    parts = [part for row, ids in zip(ROWS, batch["input_ids"], strict=True) for part in ids[: sum(row)].split(row)]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    places = torch.arange(max(lengths)).expand_as(ids)
    return {"input_ids": ids, "position_ids": places, "attention_mask": mask, "loss_mask": mask * (places > 0)}


def adapters(model: Any) -> Any:
    transformers.set_seed(0)
    config = LoraConfig(r=4, target_modules=lora_targets(model, "all"), modules_to_save=["dijiang"])
    student: Any = get_peft_model(model, config).train()
    with torch.no_grad():  # the second factor starts at zero
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return student


def distillation(student: Any, batch: dict[str, Tensor]) -> Tensor:
    teacher = live_teacher(student, batch, lambda: original(student))
    return distillation_loss(student, teacher, batch, 0.3)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def squared_error(output: Tensor, target: Tensor, real: Tensor) -> Tensor:
    return ((output - target).float().square() * real[..., None, None]).mean((2, 3)).sum() / real.sum()


@pytest.mark.parametrize("variant", ["frequency", "pure", "paper", "partial-first"])
@pytest.mark.parametrize("kind", KINDS)
def test_transfer_of_a_packed_row_is_that_of_its_documents(
    kind: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors before they are normalised, which each row is by itself."""
    monkeypatch.setitem(transfer_attention.__globals__, "normalized_error", squared_error)
    model = load(kind, variant).requires_grad_(False)
    for child in kernels(model):
        child.requires_grad_(True)
    losses, found = [], []
    for batch in (packed(), documents()):
        with transferring(model):
            losses.append(attention_transfer_loss(model, batch))
        found.append(gradients(model, losses[-1]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    assert_same(*found)
    with transferring(model):
        mixed = attention_transfer_loss(model, {**packed(), "position_ids": torch.arange(LENGTH)[None]})
    assert abs(mixed.item() - losses[0].item()) > 1e-3 * losses[0].item()


def test_distillation_of_a_packed_row_is_that_of_its_documents() -> None:
    student = adapters(load("llama"))
    loss, expected = (distillation(student, batch) for batch in (packed(), documents()))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert_same(gradients(student, loss), gradients(student, expected))
    torch.testing.assert_close(
        cross_entropy_loss(student, packed()), cross_entropy_loss(student, documents()), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", ["frequency", "partial"])
def test_lora_with_gradient_checkpointing_learns_the_same(variant: str, reentrant: bool) -> None:
    student = adapters(load("llama", variant))
    expected = gradients(student, distillation(student, packed()))
    student.gradient_checkpointing_enable({"use_reentrant": reentrant})
    student.enable_input_require_grads()
    assert_same(gradients(student, distillation(student, packed())), expected)


def test_a_model_that_mixes_documents_is_refused() -> None:
    """Opt of transformers alone hands positions to no mask; converted it keeps documents apart."""
    config = config_of("opt", initializer_range=0.25)
    with pytest.raises(DijiangError, match="opt lets documents of a packed row see each other") as error:
        check_packing(random_model(config))
    assert "\n" not in str(error.value)
    for model in (load("llama"), load("neox", "pure"), AutoModelForCausalLM.from_pretrained(source("llama"))):
        training = model.train().training
        check_packing(model)
        assert model.training == training
