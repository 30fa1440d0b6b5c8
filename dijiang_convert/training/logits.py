"""Stage 2, logit distillation: the whole model learns the softmax model's distribution of the next token.

Logits take more memory than anything else in training (tokens × vocabulary, several times in float32), so they are
never there all at once: models run up to their last hidden state, and from there chunk by chunk. A chunk's gradient is
computed right after its loss, and only the hidden states' (and a trained head's) is kept.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..checkpoint.loading import generates
from .gradients import gradients, with_gradients

# Logits of a chunk, a few tensors of which are alive at a time. On the CPU allocations beyond 32 MB are returned to the
# system and faulted in anew each time; a GPU wants large matrix products. Fewer rows than LEAST_ROWS are slow on both.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
LEAST_ROWS = 128

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""The loss, summed over a chunk, of its logits [n, vocabulary] and which of all counted positions it holds."""


# ----------------------------------------------------------------------------------------------- plain definitions


def kl_divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) a token, averaged over those that ``mask`` [B, N] marks. Logits [B, N, vocabulary]."""
    real = mask.bool()
    log_q, log_p = student[real].float().log_softmax(-1), teacher[real].float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def cross_entropy(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Next-token loss, averaged over the targets that ``mask`` marks. Logits [B, N, vocabulary], others [B, N]."""
    real = mask[:, 1:].bool()
    return F.cross_entropy(logits[:, :-1][real].float(), input_ids[:, 1:][real])


# ---------------------------------------------------------------------------------------------------------- losses


def distillation_loss(student: Any, teacher: ChunkLoss, inputs: dict[str, Any], cross_entropy_weight: float) -> Tensor:
    """KL to the teacher, with a share of next-token loss mixed in: what `kl_divergence` and `cross_entropy` give.

    Both judge the prediction of every target that loss_mask marks. teacher: as `live_teacher` gives it.
    """
    labels = inputs["input_ids"][:, 1:][counted(inputs)]

    def loss(logits: Tensor, part: slice) -> Tensor:
        total = teacher(logits, part)
        if cross_entropy_weight:
            plain = F.cross_entropy(logits.float(), labels[part], reduction="sum")
            total = (1 - cross_entropy_weight) * total + cross_entropy_weight * plain
        return total

    return mean_loss(student, inputs, loss)


def cross_entropy_loss(student: Any, inputs: dict[str, Any]) -> Tensor:
    """Plain language modelling: what `cross_entropy` gives."""
    labels = inputs["input_ids"][:, 1:][counted(inputs)]
    return mean_loss(
        student, inputs, lambda logits, part: F.cross_entropy(logits.float(), labels[part], reduction="sum")
    )


def live_teacher(
    teacher: Any, inputs: dict[str, Any], within: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> ChunkLoss:
    """KL to a model that runs here. ``within`` makes it the teacher, where it is the student otherwise; the head is
    the same in both."""
    with torch.no_grad(), within():
        hidden = hidden_states(teacher, **tokens(inputs))[:, :-1][counted(inputs)]

    def divergence(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            target = head(teacher, hidden[part])
        return divergence_sum(logits, target)

    return divergence


def divergence_sum(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student), summed over positions, of logits [n, vocabulary]. Its gradient is q − p: written out, it
    takes half the passes over the vocabulary."""
    with torch.no_grad():
        log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        p = log_p.exp()
        value = torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
        gradient = log_q.exp_().sub_(p)
    return with_gradients(value, [student], [gradient])


def mean_loss(model: Any, inputs: dict[str, Any], loss: ChunkLoss) -> Tensor:
    """The mean of ``loss`` over all targets of a batch, 0 where there is none, without holding all their logits.

    model: the one whose forward pass synchronises gradients, where several processes share the batch.
    """
    if any(isinstance(p, DTensor) for p in model.parameters()):
        # Sharded over processes, the head's weights are whole only within the forward pass they belong to.
        logits = model(**tokens(inputs)).logits[:, :-1][counted(inputs)]
        return loss(logits, slice(None)) / max(len(logits), 1)
    hidden = hidden_states(model, **tokens(inputs))[:, :-1][counted(inputs)]
    trained = head_parameters(model) if torch.is_grad_enabled() else []
    total = torch.zeros((), device=hidden.device)
    of_hidden, of_head = torch.zeros_like(hidden), [torch.zeros_like(p) for p in trained]
    for part in parts(model, hidden):
        chunk = hidden[part].detach().requires_grad_(torch.is_grad_enabled())
        value = loss(head(model, chunk), part)
        total += value.detach()
        if value.requires_grad:
            of_hidden[part], *more = gradients(value, [chunk, *trained])
            for sum_, gradient in zip(of_head, more, strict=True):
                sum_ += gradient
    return with_gradients(total, [hidden, *trained], [of_hidden, *of_head]) / max(len(hidden), 1)


def parts(model: Any, hidden: Tensor) -> Iterator[slice]:
    """Cuts hidden states [n, hidden] into chunks whose logits are small."""
    vocabulary = inner_model(model).config.get_text_config().vocab_size
    rows = max(CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"]) // vocabulary, LEAST_ROWS)
    yield from (slice(start, start + rows) for start in range(0, len(hidden), rows))


def tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    """What of a batch the model gets. Padding is on the right: causal models need no mask for it, only losses do."""
    if "position_ids" not in inputs:  # whole rows of an encoder, or images
        return inputs
    return {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "use_cache": False}


def counted(inputs: dict[str, Any]) -> Tensor:
    """[B, N − 1], True where the next token counts as a target."""
    return inputs["loss_mask"][:, 1:].bool()


# ---------------------------------------------------------------------------------------------- a model in two parts


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """The last hidden state [B, N, hidden], before the output head. The whole forward pass runs, so that whatever
    wraps the model has its say, but its head sees one position."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output.last_hidden_state)
        output.last_hidden_state = output.last_hidden_state[:, :1]

    handle = body(model).register_forward_hook(keep)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return torch.cat(found, 1)


def head(model: Any, hidden: Tensor) -> Tensor:
    """Logits [n, vocabulary] of hidden states [n, hidden], by the model's own code: its forward pass runs with a body
    that gives them, so that scaling, soft-capping and whatever else lies behind it is the model's."""
    model, inside = inner_model(model), body(model)
    inside.forward = lambda *args, **kwargs: _Output(last_hidden_state=hidden[None])  # hides the class' own
    try:
        return model(inputs_embeds=hidden[None], use_cache=False).logits[0]
    finally:
        del inside.forward


def head_parameters(model: Any) -> list[nn.Parameter]:
    """What trains in the head: an embedding too where the two are tied."""
    named, inside = inner_model(model).named_parameters(remove_duplicate=False), body_name(model)
    found = {id(p): p for name, p in named if p.requires_grad and not name.startswith(f"{inside}.")}
    return list(found.values())  # once each, though a head may have one under two names


def body_name(model: Any) -> str:
    """Of what lies before the head, as in gpt_neox or model.decoder; empty where there is no head."""
    inside = body(model)
    return next(name for name, module in inner_model(model).named_modules() if module is inside)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """transformers' model inside of peft's and other wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def body(model: Any) -> nn.Module:
    """What gives the last hidden state."""
    inner: Any = inner_model(model)
    return inner.get_decoder() if generates(inner) else inner.base_model


class _Output(BaseModelOutput):
    """A body's output of which only the last hidden state is known."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
