"""What the kernels compute, one query after the other: the definition that every fast form is compared with.

Sums are taken as they are written, with nothing to keep them inside the range of their numbers: give float64. Results
can be differentiated.

Shape legend: B batch, H query heads, G key/value heads, R = H / G, N tokens, D head_dim, V value head_dim, F features,
C tokens of a block, P blocks of the window before the query's own, M rows of sinks and memory, K keys that are read.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from dijiang_convert.modeling.configuration_dijiang import Kernel
from dijiang_convert.modeling.state import Decay
from dijiang_convert.modeling.table import Logits


class Inputs(NamedTuple):
    """Tokens of a batch. q: [B, H, N, D]. k, v: [B, G, N, D or V]. features: [B, H, N, F], log e^{g(q)} φ(q), and
    written: [B, G, N, F], log e^{g(k)} φ(k); both None without a state. decay: [B, G, N, 1 or F] in each of its parts,
    log γ of the state as each key enters it."""

    q: Tensor
    k: Tensor
    v: Tensor
    features: Tensor | None = None
    written: Tensor | None = None
    decay: Decay = Decay()

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        *tensors, decay = self
        return Inputs(*(None if x is None else change(x) for x in tensors), decay.map(change))  # type: ignore[arg-type]


class Text(NamedTuple):
    """One text of one key/value head: as `Inputs` without [B, G], so that queries are [R, N, D or F]. sink: [R]."""

    q: Tensor
    k: Tensor
    v: Tensor
    features: Tensor | None
    written: Tensor | None
    decay: Tensor | None
    sink: Tensor | None


def table(
    x: Inputs,
    kernel: Kernel,
    logits: Logits,
    real: Tensor | None = None,
    documents: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention over the table, [B, H, N, V]; 0 for padding.

    real: [B, N], False for padding. documents: [B, N], which text of its row a token is of. causal: False for encoders.
    """
    return _by_text(lambda text: _table(text, kernel, logits, causal), x, logits.sink, real, documents)


def linear(
    x: Inputs, normalize: bool, real: Tensor | None = None, documents: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Σ_j φ(q_i)·φ(k_j) γ_ij v_j over keys j ≤ i, or over all; divided by the same without v_j if ``normalize``.
    Arguments and result as of `table`."""
    return _by_text(lambda text: _linear(text, normalize, causal), x, None, real, documents)


def _by_text(
    compute: Callable[[Text], Tensor], x: Inputs, sink: Tensor | None, real: Tensor | None, documents: Tensor | None
) -> Tensor:
    """``compute`` of every text and key/value head alone: it never sees padding or another document."""
    batch, heads, length = x.q.shape[:3]
    kv_heads = x.k.shape[1]
    parts_of_decay = [t for t in x.decay if t is not None]
    decay = sum(parts_of_decay[1:], parts_of_decay[0]) if parts_of_decay else None
    real = torch.ones(batch, length, dtype=torch.bool) if real is None else real
    documents = torch.zeros(batch, length, dtype=torch.long) if documents is None else documents
    group = heads // kv_heads
    rows = []
    for b in range(batch):
        out = x.v.new_zeros(heads, length, x.v.shape[-1])
        for document in documents[b].unique():
            index = (real[b] & (documents[b] == document)).nonzero()[:, 0]
            if not len(index):
                continue
            parts = []
            for g in range(kv_heads):
                own = slice(g * group, (g + 1) * group)
                queries = [t if t is None else t[b, own][:, index] for t in (x.q, x.features)]
                keys = [t if t is None else t[b, g][index] for t in (x.k, x.v, x.written, decay)]
                text = Text(
                    queries[0], *keys[:2], queries[1], *keys[2:], None if sink is None else sink[own]  # type: ignore[arg-type]
                )  # fmt: skip
                parts.append(compute(text))
            out = out.index_copy(1, index, torch.cat(parts))
        rows.append(out)
    return torch.stack(rows)


# ----------------------------------------------------------------------------------------------------------- the table


def _table(text: Text, kernel: Kernel, logits: Logits, causal: bool) -> Tensor:
    """[R, N, V]."""
    length, size, reach = len(text.k), kernel.block, kernel.window // kernel.block
    blocks = range(-(-length // size))
    first = [max(block - reach, 0) * size for block in blocks]  # key of each block's window
    after = [min((block + reach + 1) * size, length) for block in blocks]  # and the one behind the last, for encoders
    windows = [range(first[n // size], n + 1 if causal else after[n // size]) for n in range(length)]

    received = text.k.new_zeros(length)
    for n, window in enumerate(windows if kernel.memory else []):  # where nothing is chosen, nothing is scored
        received[window.start : window.stop] += _exact(text, n, window, logits).detach().softmax(-1).sum(0)

    read, entered = [None] * len(blocks), [None] * len(blocks)  # the states, by block
    if text.written is not None:
        before, behind = _sums(text)
        read = [before[i] if causal else before[i].plus(behind[j]) for i, j in zip(first, after, strict=True)]
        entered = [before[block * size] for block in blocks] if causal else read
    score = []
    for j in range(length):
        error = _recall_error(text, j, entered[j // size]).detach()
        score.append(float("inf") if j < kernel.sinks else (received[j] * error).item())

    kept = text._replace(k=_eight_bits(text.k), v=_eight_bits(text.v)) if causal else text
    outputs = []
    for n, window in enumerate(windows):
        block = n // size
        outside = range(first[block]) if causal else [*range(first[block]), *range(after[block], length)]
        candidates = [j for j in outside if kernel.memory or j < kernel.sinks]
        best = sorted(candidates, key=lambda j: (-score[j], j))[: kernel.sinks + kernel.memory]
        rows = [_exact(kept, n, best, logits), _exact(text, n, window, logits)]
        values = [kept.v[best], text.v[list(window)]]
        outputs.append(_read(text, n, rows, values, read[block]))
    return torch.stack(outputs, 1)


def _eight_bits(x: Tensor) -> Tensor:
    """Each row as whole numbers from −127 to 127 times a power of two; gradients as if it were not."""
    unit = 2 ** (x.detach().abs().amax(-1, keepdim=True).log2().floor() - 6)
    return x + ((x / unit).round().clamp(-127, 127) * unit - x).detach()


def _exact(text: Text, n: int, keys: Iterable[int], logits: Logits) -> Tensor:
    """Logits of real keys for the queries of token n, [R, K]."""
    found = text.q[:, n] @ text.k[list(keys)].T * logits.scaling
    return found if logits.softcap is None else logits.softcap * torch.tanh(found / logits.softcap)


def _read(text: Text, n: int, rows: list[Tensor], values: list[Tensor], state: "Sums | None") -> Tensor:
    """What the queries of token n read from rows of keys, with logits [R, K] and values [K, V], and from the state:
    [R, V]."""
    if state is not None and text.features is not None and state.weight.any():
        rows.append(text.features[:, n] + state.weight.log())
        values.append(state.value / state.weight[:, None])
    if text.sink is not None:
        rows.append(text.sink[:, None])
        values.append(torch.zeros_like(text.v[:1]))
    return torch.cat(rows, 1).softmax(1) @ torch.cat(values)


# ----------------------------------------------------------------------------------------------------------- the state


class Sums(NamedTuple):
    """A state as sums over keys. value: [F, V], Σ e^{g(k)} φ(k) v. weight: [F], the same without v."""

    value: Tensor
    weight: Tensor

    def plus(self, other: "Sums") -> "Sums":
        return Sums(self.value + other.value, self.weight + other.weight)


def _sums(text: Text) -> tuple[list[Sums], list[Sums]]:
    """At each n from 0 to N: of the keys before n, and of those from n on, which are taken from the last to the first.
    A key that enters makes the sum that it enters smaller by its decay."""
    assert text.written is not None
    sides = []
    for order in (range(len(text.k)), reversed(range(len(text.k)))):
        state = Sums(text.v.new_zeros(text.written.shape[1], text.v.shape[1]), text.v.new_zeros(text.written.shape[1]))
        states = [state]
        for j in order:
            kept = torch.ones_like(state.weight) if text.decay is None else text.decay[j].exp().expand_as(state.weight)
            weight = text.written[j].exp()
            state = Sums(state.value * kept[:, None] + weight[:, None] * text.v[j], state.weight * kept + weight)
            states.append(state)
        sides.append(states)
    return sides[0], sides[1][::-1]


def _recall_error(text: Text, j: int, state: Sums | None) -> Tensor:
    """‖S(k_j) / z(k_j) − v_j‖², how far what a state answers to a key lies from its value; 1 without a state."""
    if state is None or text.written is None:
        return torch.ones(())
    weight = text.written[j].exp()
    total = weight @ state.weight
    answer = torch.zeros_like(text.v[j]) if total == 0 else weight @ state.value / total
    return (answer - text.v[j]).square().sum()


def _linear(text: Text, normalize: bool, causal: bool) -> Tensor:
    """[R, N, V]."""
    assert text.features is not None
    before, behind = _sums(text)
    outputs = []
    for n in range(len(text.k)):
        state = before[n + 1] if causal else before[n + 1].plus(behind[n + 1])
        query = text.features[:, n].exp()
        total = query @ state.weight if normalize else torch.ones(len(query), dtype=query.dtype)
        outputs.append(query @ state.value / total[:, None])
    return torch.stack(outputs, 1)
