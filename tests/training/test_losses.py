"""The losses: that chunks, recomputing and caching change memory and nothing else."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dijiang_convert.training import attention_transfer, logits
from dijiang_convert.training.adapters import lora_targets
from dijiang_convert.training.attention import original, recomputing
from dijiang_convert.training.attention_transfer import attention_transfer_loss, transferring
from dijiang_convert.training.logits import (
    cross_entropy_loss,
    distillation_loss,
    live_teacher,
    tokens,
)
from tests.models import KINDS, load
from tests.sources_on_disk import VOCABULARY, random_model

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50, "pad_token_id": 0}
LLAMA = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
# What makes each family's way from the last hidden state to logits its own.
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=24),
    "gpt2, tied": lambda: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50),
    "gemma2, soft-capped": lambda: transformers.Gemma2Config(**LLAMA, final_logit_softcapping=0.5),
    "cohere, logit_scale": lambda: transformers.CohereConfig(**LLAMA, logit_scale=0.3),
    "granite, logits_scaling": lambda: transformers.GraniteConfig(**LLAMA, logits_scaling=3.0),
    "opt, project_out": lambda: transformers.OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=12, dropout=0.0),
    "phi, biased": lambda: transformers.PhiConfig(**SMALL, intermediate_size=24),
    "mixtral, router losses": lambda: transformers.MixtralConfig(
        **LLAMA, num_local_experts=2, output_router_logits=True
    ),
    "roberta, dense in the head": lambda: transformers.RobertaConfig(
        **SMALL, intermediate_size=24, is_decoder=True, hidden_dropout_prob=0.0, max_position_embeddings=64
    ),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last of them short."""
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", {"cuda": 0})
    monkeypatch.setattr(logits, "LEAST_ROWS", 7)


def batch(vocabulary: int, rows: int = 2, length: int = 24) -> dict[str, Tensor]:
    """With padding on the right and targets that don't count."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - 5 :] = 0
    loss_mask = mask * (torch.rand(ids.shape, generator=generator) > 0.2)
    positions = torch.arange(length).expand_as(ids)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "loss_mask": loss_mask}


def kl_divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats, the mean over the positions that mask [B, N] marks; logits [B, N, vocabulary]."""
    real = mask.bool()
    log_q, log_p = student[real].log_softmax(-1), teacher[real].log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def cross_entropy(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Next-token loss in nats, the mean over the targets that mask [B, N] marks; logits [B, N, vocabulary]."""
    real = mask[:, 1:].bool()
    return F.cross_entropy(logits[:, :-1][real], input_ids[:, 1:][real])


def plain_distillation(student: Any, target: Tensor, inputs: dict[str, Tensor], weight: float) -> Tensor:
    """The definition, on whole logits."""
    given = student(**tokens(inputs)).logits
    divergence = kl_divergence(given[:, :-1], target[:, :-1], inputs["loss_mask"][:, 1:])
    return (1 - weight) * divergence + weight * cross_entropy(given, inputs["input_ids"], inputs["loss_mask"])


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert any(gradient.abs().max() > 1e-6 for gradient in found.values())
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def adapted(kind: str, which: str = "all") -> Any:
    """A converted model with adapters that do something, and kernels that train."""
    model = load(kind).train()
    student = get_peft_model(
        model, LoraConfig(r=4, target_modules=lora_targets(model, which), modules_to_save=["dijiang"])
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    return student


# ----------------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_give_the_plain_losses_and_gradients(family: str, small_chunks: None) -> None:
    student, teacher = random_model(FAMILIES[family]()), random_model(FAMILIES[family]())
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.3)
    inputs = batch(50)
    with torch.no_grad():
        target = teacher(**tokens(inputs)).logits
    plain = plain_distillation(student, target, inputs, 0.3)
    chunked = distillation_loss(student, live_teacher(teacher, inputs), inputs, 0.3)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-4)
    assert_same(gradients_of(student, 3 * chunked), gradients_of(student, 3 * plain))

    plain = cross_entropy(student(**tokens(inputs)).logits, inputs["input_ids"], inputs["loss_mask"])
    chunked = cross_entropy_loss(student, inputs)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-4)
    assert_same(gradients_of(student, chunked), gradients_of(student, plain))


@pytest.mark.parametrize("kind", KINDS)
def test_with_adapters_the_model_is_its_own_teacher(kind: str, small_chunks: None) -> None:
    student, inputs = adapted(kind), batch(VOCABULARY, length=60)
    with torch.no_grad():
        target = load(kind, attention="sdpa")(**tokens(inputs)).logits
    plain = plain_distillation(student, target, inputs, 0.0)
    chunked = distillation_loss(student, live_teacher(student, inputs, lambda: original(student)), inputs, 0.0)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-4)
    found = gradients_of(student, chunked)
    assert_same(found, gradients_of(student, plain))
    assert any(".dijiang." in name for name in found)
    assert any("lora_A" in name for name in found)


def test_the_teacher_has_no_dropout_and_the_student_keeps_its_mode() -> None:
    student, inputs = adapted("neox"), batch(VOCABULARY)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    seen = []

    def note(given: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return given.sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits, "divergence_sum", note)
        for _ in range(2):
            distillation_loss(student, live_teacher(student, inputs, lambda: original(student)), inputs, 0.0)
    assert torch.equal(*seen)
    assert student.training
    assert all(module.training for module in student.modules())


def test_a_batch_without_targets_costs_nothing() -> None:
    student, inputs = load("llama"), batch(VOCABULARY)
    inputs["loss_mask"] = torch.zeros_like(inputs["loss_mask"])
    loss = cross_entropy_loss(student, inputs)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_the_head_gets_no_adapters() -> None:
    model = random_model(FAMILIES["roberta, dense in the head"]())
    targets = lora_targets(model, "all")
    assert targets
    assert not [name for name in targets if "lm_head" in name]


# ---------------------------------------------------------------------------------------------- memory for gradients


class Saved:
    """Bytes that autograd keeps for backward passes: now, and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def __enter__(self) -> "Saved":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box[0])
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def pack(self, tensor: Tensor) -> Any:
        class Box(list):
            pass

        box = Box([tensor.detach()])
        self.now += tensor.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(box, self.release, tensor.nbytes)
        return box

    def release(self, count: int) -> None:
        self.now -= count


def test_transfer_gives_the_gradients_of_all_layers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = load("llama"), batch(VOCABULARY, length=100)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dijiang." in name)
    with transferring(model), Saved() as at_once:
        loss = attention_transfer_loss(model, inputs)
    kept = at_once.now
    one_by_one = gradients_of(model, loss)
    monkeypatch.setattr(attention_transfer, "gradients", lambda loss, parameters: loss)
    monkeypatch.setattr(attention_transfer, "with_gradients", lambda value, parameters, loss: loss)
    with transferring(model), Saved() as together:
        plain = attention_transfer_loss(model, inputs)
    assert_same(one_by_one, gradients_of(model, plain), 1e-7)
    assert kept == 0
    assert at_once.peak < 0.6 * together.peak  # one of two layers


@pytest.mark.parametrize("train", ["lora", "full"])
def test_recomputing_and_checkpointing_change_no_gradient(train: str) -> None:
    student = adapted("llama") if train == "lora" else load("llama").train()
    model, inputs = logits.inner_model(student), batch(VOCABULARY, length=100)
    teacher = load("llama", attention="sdpa")

    def run(inside: Any) -> tuple[dict[str, Tensor], int]:
        with inside, Saved() as saved:
            target = live_teacher(teacher, inputs)
            loss = distillation_loss(student, target, inputs, 0.2)
            kept = saved.now
            return gradients_of(student, loss), kept

    plain, all_kept = run(nullcontext())
    recomputed, few_kept = run(recomputing(model))
    assert_same(plain, recomputed, 1e-6)
    assert few_kept < 0.6 * all_kept
    student.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed, fewer_kept = run(nullcontext())
    assert_same(plain, checkpointed, 1e-6)
    assert fewer_kept < few_kept


def memory_of(*ways: str, **options: int) -> dict[str, float]:
    """The ratios that the benchmark's script finds."""
    script = Path(__file__).parents[2] / "benchmarks" / "training.py"
    given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, str(script), "--memory", *ways, *given, "--times"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout)["ratios"]


def test_distillation_takes_the_memory_of_plain_lora() -> None:
    """Of whole processes, where logits outweigh all else."""
    ratios = memory_of("plain", "distill", vocabularies=32_768, hidden=128, layers=4, length=768)
    assert ratios["distill_over_plain_peak"] < 1.25
