"""The state of a layer: a row for each feature, with a weight and the weighted mean of the values written to it.

A key writes its value to every row f with the weight e^{b g(k)} φ_f(k), and all weights decay as later keys enter. So a
state is read by attention: a query's logit for row f is log e^{g(q)} φ_f(q) + log_weight_f. Weights are kept as
logarithms, which float32 holds however far apart they are, and means don't drift. `feature_map` makes the features and
`decay` the decays.

Shape legend: B batch, G key/value heads, n blocks, C tokens of a block, P blocks of the window before the query's
own, V value head_dim, F features.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# NEVER stands for the logarithm of 0, and is finite, so that the difference of two of these is a number.
NEVER = -1e30


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 model."""
    return torch.promote_types(x.dtype, torch.float32)


def accumulated(x: Tensor) -> Tensor:
    """x in its accumulation dtype."""
    return x.to(accumulation_dtype(x))


def recurrent_dtype(like: Tensor) -> torch.dtype:
    """float64, the dtype of a log_weight to which single tokens are added: in float32 rounding errors would add up. On
    MPS, which has no float64, it is float32."""
    return torch.float32 if like.device.type == "mps" else torch.float64


class State(NamedTuple):
    """A state: its rows' weights, and the means of the values in them.

    log_weight: [B, G, F] or [B, G, n, F], log of the sum of all keys' weights. value: [..., F, V], the mean of their
    values by these weights; arbitrary where log_weight is NEVER.
    """

    log_weight: Tensor
    value: Tensor

    @classmethod
    def empty(cls, batch: int, kv_heads: int, features: int, value_dim: int, like: Tensor) -> "State":
        """A state that has seen no key, on the device of ``like`` and in its accumulation dtype."""
        dtype = accumulation_dtype(like)
        log_weight = torch.full((batch, kv_heads, features), NEVER, dtype=dtype, device=like.device)
        return cls(log_weight, log_weight.new_zeros(batch, kv_heads, features, value_dim))

    def then(self, later: "State", decay: Tensor | None = None) -> "State":
        """This state, decayed, with the keys of the state ``later``. decay: [..., 1 or F], log γ, or None."""
        log_weight = self.log_weight if decay is None else self.log_weight + decay
        total = torch.logaddexp(log_weight, later.log_weight)
        share = (later.log_weight - total).exp().to(self.value.dtype)
        return State(total, torch.lerp(self.value, later.value, share[..., None]))


class Decay(NamedTuple):
    """log γ ≤ 0, the part of the state that is kept when a key enters, as the sum of two tensors; None for 0.

    head: [..., C, 1], of all features of a head. features: [..., C, F], of each feature. The exponential of the sum of
    ``features`` over a block fits in float32, so it can be a factor.
    """

    head: Tensor | None = None
    features: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Decay":
        return Decay(*(None if x is None else change(x) for x in self))

    def total(self) -> Tensor | None:
        """The sum of both over a block, [..., 1 or F], or None for 0."""
        head, features = (None if x is None else x.sum(-2) for x in self)
        if head is None or features is None:
            return features if head is None else head
        return head + features


class Written(NamedTuple):
    """What keys write to the state.

    features: [..., C, F], log φ(k). log_scale: [..., C, 1], b g(k) and what `selective` adds to it; NEVER for padding.
    values: [..., C, V]. decay: of the state, as each key enters.
    """

    features: Tensor
    log_scale: Tensor
    values: Tensor
    decay: Decay

    def map(self, change: Callable[[Tensor], Tensor]) -> "Written":
        return Written(change(self.features), change(self.log_scale), change(self.values), self.decay.map(change))

    def logits(self) -> Tensor:
        """Log weights of the keys, log e^{b g(k)} φ(k), [..., C, F]."""
        return self.features + self.log_scale

    def summary(self) -> tuple[State, Tensor | None]:
        """The state of a block's keys alone, [..., F], and the decay of earlier keys by the block, [..., 1 or F]."""
        size = self.features.shape[-2]
        after = torch.ones(size, size, dtype=self.features.dtype, device=self.features.device).triu(1)
        scale, (head, features) = self.log_scale, self.decay  # each key decays by the keys after it
        scale = scale if head is None else scale + after @ head
        logits = self.features + scale if features is None else (after @ features).add_(scale).add_(self.features)
        top = logits.detach().amax(-2, keepdim=True)
        weights = (logits - top).exp_()
        sums = weights.sum(-2)
        value = weights.mT @ self.values.to(weights.dtype) / sums[..., None]
        return State(top.squeeze(-2) + sums.log(), value), self.decay.total()


def recall(features: Tensor, state: State) -> Tensor:
    """A state's answer to keys, [..., C, V], or 0 from an empty state. features: [..., C, F], log φ(k)."""
    answer = (features + state.log_weight[..., None, :]).softmax(-1) @ state.value
    is_empty = state.log_weight.amax(-1) <= NEVER / 2
    return answer.masked_fill(is_empty[..., None, None], 0)


def block_states(written: list[Written], age: Tensor, behind: int, start: State | None) -> State:
    """The state that each of n blocks reads, [B, G, n, …]. Entry i of ``written`` enters before block i + 1 reads.

    Args:
        written: what n − 1 blocks write, [B, G, n − 1, C, …], in pieces along n.
        age: [B or 1, n], which block of its document each block is. A state holds keys of one document.
        behind: how many blocks lie between the block that entry i is of and block i + 1: P with a window, else 0.
        start: the state that the first block reads, or None for an empty one.
    """
    states, decays = zip(*(piece.summary() for piece in written), strict=True)
    age = age[:, None, 1:, None]
    log_weight = torch.cat([state.log_weight for state in states], 2).masked_fill(age <= behind, NEVER)
    decay = torch.zeros_like(log_weight[..., :1]) if decays[0] is None else torch.cat(decays, 2)
    decay = decay.masked_fill(age == 0, NEVER)
    if start is None:
        batch, kv_heads, _, features, values = states[0].value.shape
        start = State.empty(batch, kv_heads, features, values, log_weight)
    if isinstance(log_weight.shape[2], torch.SymInt):  # an export for any length has the loop in its graph
        return _scanned(start, State(log_weight, states[0].value), decay)
    # Blocks are taken by unbind, since the gradient of an index is as large as all blocks together.
    value = [block for state in states for block in state.value.unbind(2)]
    if not value:  # nothing is written: sums of no numbers give all parameters a gradient of 0
        start = State(start.log_weight + log_weight.sum(), start.value + states[0].value.sum())
    read = [start]
    for entering in zip(log_weight.unbind(2), value, decay.unbind(2), strict=True):
        read.append(read[-1].then(State(*entering[:2]), entering[2]))
    return State(*(torch.stack(parts, 2) for parts in zip(*read, strict=True)))


def _scanned(start: State, entering: State, decay: Tensor) -> State:
    """The loop of `block_states` as one operation of a graph."""
    from torch._higher_order_ops.scan import scan

    def step(state: tuple[Tensor, Tensor], block: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return tuple(State(*state).then(State(*block[:2]), block[2])), tuple(x.clone() for x in state)

    last, before = scan(step, tuple(start), tuple(x.movedim(2, 0) for x in (*entering, decay)))
    return State(*(torch.cat([x.movedim(0, 2), y[:, :, None]], 2) for x, y in zip(before, last, strict=True)))
