"""The objectives distillation and cross-entropy: the whole model learns to predict the next token.

Logits take more memory than anything else in training (tokens × vocabulary, several times in float32), so they are
never in memory all at once. A model runs up to its last hidden states, and its head then computes the logits chunk by
chunk. The gradient of a chunk is computed right after its loss, and only the gradients of the hidden states and of a
trained head are kept. Models that predict no next token have `outputs` instead.

Shape legend: B batch, N tokens, n positions, in `mean_loss` those of a batch whose next token is a target.
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

# Elements of a chunk of logits; a few tensors of this size are alive at a time. A CPU returns allocations beyond 32 MB
# to the system and faults them in anew each time, and a GPU wants large matrix products. On both, chunks of fewer
# positions than LEAST_ROWS are slow.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
LEAST_ROWS = 128

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""The loss, summed over a chunk, of its logits [n, vocabulary] and which of all counted positions it holds."""


# ---------------------------------------------------------------------------------------------------------- losses


def distillation_loss(student: Any, teacher: ChunkLoss, inputs: dict[str, Any], cross_entropy_weight: float) -> Tensor:
    """KL to the teacher, with a share of next-token loss mixed in, averaged over the targets that loss_mask marks.

    student: as ``model`` of `mean_loss`. teacher: the loss that `live_teacher` returns. inputs: a batch of `Rows`.
    cross_entropy_weight: the share of next-token loss, from 0 to 1.
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
    """Next-token loss alone, averaged over the targets that loss_mask marks."""
    labels = inputs["input_ids"][:, 1:][counted(inputs)]
    return mean_loss(
        student, inputs, lambda logits, part: F.cross_entropy(logits.float(), labels[part], reduction="sum")
    )


def live_teacher(
    teacher: Any, inputs: dict[str, Any], within: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> ChunkLoss:
    """Runs the teacher on a batch and returns the loss KL(teacher ‖ student) of a chunk.

    within: a context in which ``teacher`` is the teacher, where it is the student otherwise. The head runs outside of
    it, since student and teacher have the same head then.
    """
    with torch.no_grad(), within():
        hidden = hidden_states(teacher, **tokens(inputs))[:, :-1][counted(inputs)]

    def divergence(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            target = head(teacher, hidden[part])
        return divergence_sum(logits, target)

    return divergence


def divergence_sum(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats, summed over positions.

    Its gradient, the student's distribution minus the teacher's, is written out: that takes half as many passes over
    the vocabulary as autograd.

    student, teacher: [n, vocabulary] logits.
    """
    with torch.no_grad():
        log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        p = log_p.exp()
        value = torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
        gradient = log_q.exp_().sub_(p)
    return with_gradients(value, [student], [gradient])


def mean_loss(model: Any, inputs: dict[str, Any], loss: ChunkLoss) -> Tensor:
    """The mean of ``loss`` over all targets of a batch, 0 if it has none, without holding all their logits.

    model: where several processes share a step, the wrapper whose forward pass synchronises gradients.
    inputs: a batch of `Rows`.
    """
    if any(isinstance(p, DTensor) for p in model.parameters()):
        # The head's weights are sharded and whole only during the model's own forward pass, which makes all logits.
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
    """Slices of the positions of ``hidden`` whose logits make one chunk each. hidden: [n, hidden] hidden states."""
    vocabulary = inner_model(model).config.get_text_config().vocab_size
    rows = max(CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"]) // vocabulary, LEAST_ROWS)
    yield from (slice(start, start + rows) for start in range(0, len(hidden), rows))


def tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    """The part of a batch that the model gets. Causal models get no mask, since padding is on the right."""
    if "position_ids" not in inputs:  # the batch is of an encoder's texts, or of images
        return inputs
    return {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "use_cache": False}


def counted(inputs: dict[str, Any]) -> Tensor:
    """A mask of positions, [B, N − 1], True where the next token is a target."""
    return inputs["loss_mask"][:, 1:].bool()


# ---------------------------------------------------------------------------------------------- a model in two parts


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """The last hidden states [B, N, hidden], before the output head.

    The forward pass of the whole model runs, so that its wrappers do their part, but the head gets one position.
    """
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
    """The logits [n, vocabulary] of ``hidden``, by the model's own code.

    The model's forward pass runs with a body that returns ``hidden``, so that scaling, soft-capping and all else that
    follows the body is applied.

    hidden: [n, hidden] hidden states.
    """
    model, inside = inner_model(model), body(model)
    inside.forward = lambda *args, **kwargs: _Output(last_hidden_state=hidden[None])  # hides the method of the class
    try:
        return model(inputs_embeds=hidden[None], use_cache=False).logits[0]
    finally:
        del inside.forward


def head_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters of the head that train, among them an embedding that is tied to it."""
    named, inside = inner_model(model).named_parameters(remove_duplicate=False), body_name(model)
    found = {id(p): p for name, p in named if p.requires_grad and not name.startswith(f"{inside}.")}
    return list(found.values())  # a parameter may have two names in the head and is returned once


def body_name(model: Any) -> str:
    """The name of the `body` in the model, such as gpt_neox or model.decoder; empty if the model has no head."""
    inside = body(model)
    return next(name for name, module in inner_model(model).named_modules() if module is inside)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers inside wrappers such as peft's and DDP."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def body(model: Any) -> nn.Module:
    """The module before the head, whose output is the last hidden states."""
    inner: Any = inner_model(model)
    return inner.get_decoder() if generates(inner) else inner.base_model


class _Output(BaseModelOutput):
    """The output of a body: the last hidden states, and None for every other attribute."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
