"""Linear attentions that others have published, as children of converted attention modules.

Each is called as `dijiang_convert.modeling.attention.DiJiangAttention` is, so that one trainer and one evaluation serve
all. They are written for comparison at short lengths: quadratic where that is shorter, causal, right padding, no cache.
A state has as many numbers as DiJiang's (2·head_dim features a key/value head, shared by its query heads) unless a
class says otherwise.

Shape legend: B batch, H query heads, G key/value heads, N tokens, D head_dim, V value head_dim, F features, M slots.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dijiang_convert.modeling.attention import Call
from dijiang_convert.modeling.configuration_dijiang import Kernel, Layers
from dijiang_convert.modeling.feature_map import KeyFeatures, QueryFeatures


class Baseline(nn.Module):
    """Brings q, k, v to one shape and float32, and drops what no baseline uses."""

    def __init__(self, kernel: Kernel, layers: Layers) -> None:
        super().__init__()
        self.kernel, self.layers, self.window = kernel, layers, kernel.window

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        assert call.causal and call.cache is None and call.hidden_states is not None
        k, v = self.shared(k.float()), self.shared(v.float())
        return self.attend(q.float(), k, v, call.logits.scaling, call.hidden_states.float()).to(q.dtype)

    def shared(self, x: Tensor) -> Tensor:
        """[B, G, …] or [G, …] for every query head: what a state is made of belongs to its key/value head."""
        return x.repeat_interleave(self.layers.heads // self.layers.kv_heads, x.dim() - 3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, x: Tensor) -> Tensor:
        """q, k [B, H, N, D], v [B, H, N, V], hidden states x [B, N, hidden] → [B, H, N, V]."""
        raise NotImplementedError


class Sinks(Baseline):
    """Softmax over the window and the first four tokens (StreamingLLM, arXiv 2309.17453): no linear part at all."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, x: Tensor) -> Tensor:
        i, j = _indices(q)
        seen = (j <= i) & ((i - j < self.window) | (j < 4))
        return (q @ k.mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1) @ v


class Hedgehog(Baseline):
    """φ(x) = [softmax(W x), softmax(−W x)], W a head, from the identity (arXiv 2402.04347)."""

    def __init__(self, kernel: Kernel, layers: Layers) -> None:
        super().__init__(kernel, layers)
        self.q_map = nn.Parameter(torch.eye(layers.head_dim).repeat(layers.heads, 1, 1))
        self.k_map = nn.Parameter(torch.eye(layers.head_dim).repeat(layers.kv_heads, 1, 1))

    def features(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x @ weight.mT
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, x: Tensor) -> Tensor:
        return _normalized(self.features(q, self.q_map) @ self.features(k, self.shared(self.k_map)).mT, v)


class LoLCATs(Hedgehog):
    """Hedgehog's features beyond a window of softmax, one denominator, a learned weight a head for the window
    (arXiv 2410.10254). The weight is against the window's largest score, not in log space. One softmax over both signs
    here: better beside a window than its authors' two."""

    def __init__(self, kernel: Kernel, layers: Layers) -> None:
        super().__init__(kernel, layers)
        self.window_factor = nn.Parameter(torch.full((layers.heads,), -2.1972246))  # σ of it is 0.1

    def features(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x @ weight.mT
        return torch.cat([y, -y], -1).softmax(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, x: Tensor) -> Tensor:
        i, j = _indices(q)
        near = (j <= i) & (i - j < self.window)
        scores = (q @ k.mT * scaling).masked_fill(~near, -torch.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp() * self.window_factor.sigmoid()[:, None, None]
        far = self.features(q, self.q_map) @ self.features(k, self.shared(self.k_map)).mT
        weights = weights + far * (i - j >= self.window)
        return weights / weights.sum(-1, keepdim=True) @ v


class LoLA(LoLCATs):
    """LoLCATs as it is trained; with ``remembers``, keys that leave the window stay exact, as many as ``kernel.memory``
    a key/value head, where the state recalls them worst (arXiv 2505.23666). The others enter the state. Both move in
    blocks: a window has up to a block more than LoLCATs'. Keys in memory weigh against the window's largest score, as
    the window's own do, since that is the scale that training has seen."""

    remembers = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, x: Tensor) -> Tensor:
        if not self.remembers:
            return super().attend(q, k, v, scaling, x)
        group, block = self.layers.heads // self.layers.kv_heads, self.kernel.block
        keys, values = k[:, ::group], v[:, ::group]
        fq, fk = self.features(q, self.q_map), self.features(keys, self.k_map)
        state = fk.new_zeros(*fk.shape[:2], fk.shape[-1], v.shape[-1] + 1)  # the last column is the denominator
        kept = [y[:, :, :0] for y in (keys, values, fk)]
        outputs, first = [], 0  # the window's first token
        for start in range(0, q.shape[2], block):
            leaving = slice(first, max(first, start - self.window))
            new = (y[:, :, leaving] for y in (keys, values, fk))
            kept, state = self.choose([torch.cat(pair, 2) for pair in zip(kept, new, strict=True)], state)
            first, end = leaving.stop, min(start + block, q.shape[2])
            near = self.shared(torch.cat([kept[0], keys[:, :, first:end]], 2))
            scores = q[:, :, start:end] @ near.mT * scaling
            later = torch.ones_like(scores).triu(near.shape[2] - (end - start) + 1).bool()
            scores = scores.masked_fill(later, -torch.inf)
            largest = scores[..., kept[0].shape[2] :].amax(-1, keepdim=True)
            weights = (scores - largest).exp() * self.window_factor.sigmoid()[:, None, None]
            far = fq[:, :, start:end] @ self.shared(state)
            exact = self.shared(torch.cat([kept[1], values[:, :, first:end]], 2))
            outputs.append((weights @ exact + far[..., :-1]) / (weights.sum(-1, keepdim=True) + far[..., -1:]))
        return torch.cat(outputs, 2)

    def choose(self, rows: list[Tensor], state: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of keys [B, G, n, D], values and features, those that stay, and the state with the others in it."""
        _, values, features = rows
        recalled = features @ state
        errors = (recalled[..., :-1] / recalled[..., -1:].clamp_min(1e-9) - values).square().sum(-1)
        order = errors.argsort(dim=-1, descending=True, stable=True)[..., None]
        ordered = [y.gather(2, order.expand(-1, -1, -1, y.shape[-1])) for y in rows]
        _, gone_values, gone_features = (y[:, :, self.kernel.memory :] for y in ordered)
        summands = torch.cat([gone_values, torch.ones_like(gone_values[..., :1])], -1)
        return [y[:, :, : self.kernel.memory] for y in ordered], state + gone_features.mT @ summands


class T2R(Baseline):
    """φ(x) = relu(W x + b) (arXiv 2103.13076). W starts as the signed identity, b at a small positive number."""

    def __init__(self, kernel: Kernel, layers: Layers) -> None:
        super().__init__(kernel, layers)
        start = torch.cat([torch.eye(layers.head_dim), -torch.eye(layers.head_dim)])
        self.q_map, self.k_map = (nn.Parameter(start.repeat(n, 1, 1)) for n in (layers.heads, layers.kv_heads))
        shapes = [(heads, 1, len(start)) for heads in (layers.heads, layers.kv_heads)]
        self.q_bias, self.k_bias = (nn.Parameter(torch.full(shape, 0.1)) for shape in shapes)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, x: Tensor) -> Tensor:
        root = math.sqrt(scaling)
        fq = (root * q @ self.q_map.mT + self.q_bias).relu()
        fk = (root * k @ self.shared(self.k_map).mT + self.shared(self.k_bias)).relu()
        return _normalized(fq @ fk.mT, v)


class Performer(Baseline):
    """φ(x) = exp(W x − ‖x‖²/2), W orthogonal random and fixed (arXiv 2009.14794, FAVOR+ with positive features)."""

    def __init__(self, kernel: Kernel, layers: Layers) -> None:
        super().__init__(kernel, layers)
        size = layers.head_dim
        blocks = [torch.linalg.qr(torch.randn(layers.kv_heads, size, size))[0].mT for _ in range(2)]
        rows = torch.randn(layers.kv_heads, 2 * size, size).norm(dim=-1, keepdim=True)
        self.register_buffer("random", torch.cat(blocks, 1) * rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, x: Tensor) -> Tensor:
        root = math.sqrt(scaling)
        q, k = q * root, k * root
        random = self.shared(self.random)  # type: ignore[arg-type]
        log_q = q @ random.mT
        log_k = k @ random.mT - k.square().sum(-1, keepdim=True) / 2
        fq = (log_q - log_q.amax(-1, keepdim=True)).exp()
        fk = (log_k - log_k.amax((-2, -1), keepdim=True)).exp()
        return _normalized(fq @ fk.mT, v, least=torch.finfo(v.dtype).tiny)  # the first keys may be far from the largest


class RetNet(Baseline):
    """q·k with a fixed decay a head, no features and no denominator: group norm and an output gate instead
    (arXiv 2307.08621). Its state is half of the others': D × V."""

    def __init__(self, kernel: Kernel, layers: Layers) -> None:
        super().__init__(kernel, layers)
        spread = torch.linspace(math.log(1 / 32), math.log(1 / 512), layers.kv_heads)
        self.register_buffer("log_decay", torch.log1p(-spread.exp())[:, None, None])
        self.out = GatedNorm(layers, gate=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, x: Tensor) -> Tensor:
        i, j = _indices(q)
        decay = ((i - j) * self.shared(self.log_decay)).exp()  # type: ignore[arg-type]
        return self.out((q @ k.mT * scaling * decay).tril() @ v, x)


class ReGLA(Baseline):
    """Exponential features bounded by 1, a gate a feature that is refined against saturation, and a norm in place of
    the denominator (arXiv 2502.01578). Keys are bounded by their own token's largest, as decoding could do it."""

    def __init__(self, kernel: Kernel, layers: Layers) -> None:
        super().__init__(kernel, layers)
        size, features = layers.head_dim, 2 * layers.head_dim
        start = torch.cat([torch.eye(size), -torch.eye(size)])
        self.q_map, self.k_map = (nn.Parameter(start.repeat(n, 1, 1)) for n in (layers.heads, layers.kv_heads))
        self.forget = Gate(layers, layers.kv_heads, features, bias=5.0)
        self.refine = Gate(layers, layers.kv_heads, features, bias=0.0)
        self.out = GatedNorm(layers, gate=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, x: Tensor) -> Tensor:
        root = math.sqrt(scaling)
        fq, fk = root * q @ self.q_map.mT, root * k @ self.shared(self.k_map).mT
        fq, fk = ((y - y.amax(-1, keepdim=True)).exp() for y in (fq, fk))
        g, r = self.shared(self.forget(x)).sigmoid(), self.shared(self.refine(x)).sigmoid()
        gate = (1 - r) * g.square() + r * (1 - (1 - g).square())
        scale = 1 / (math.e * math.sqrt(fq.shape[-1] * (math.e**2 - 1)))
        return self.out(gated(fq * scale, fk, v, gate.clamp_min(1e-6).log()), x)


class GatedSlots(Baseline):
    """Keys and values are written to M = D slots, read by softmax over the slots (arXiv 2409.07146)."""

    def __init__(self, kernel: Kernel, layers: Layers) -> None:
        super().__init__(kernel, layers)
        self.forget = Gate(layers, layers.kv_heads, layers.head_dim, bias=0.0)
        self.out = GatedNorm(layers, gate=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, x: Tensor) -> Tensor:
        log_gate = F.logsigmoid(self.shared(self.forget(x))) / 8  # the paper's damping
        write = -torch.expm1(log_gate)
        slots = gated(write, k, q, log_gate, by_slot=True) * scaling  # [B, H, N, M]
        return self.out(gated(slots.softmax(-1), write, v, log_gate), x)


class Additive(Baseline):
    """DiJiang's features under the plain additive update and denominator: no decay, no log-scale."""

    def __init__(self, kernel: Kernel, layers: Layers) -> None:
        super().__init__(kernel, layers)
        self.q_features = QueryFeatures(layers.heads, layers.head_dim, kernel, scaled=False)
        self.k_features = KeyFeatures(layers.kv_heads, layers.head_dim, kernel, scaled=False)
        self.q_features.reset_parameters()
        self.k_features.reset_parameters()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, x: Tensor) -> Tensor:
        fq, fk = self.features(q, k, scaling)
        return _normalized(fq @ fk.mT, v)

    def features(self, q: Tensor, k: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        own = k[:, :: self.layers.heads // self.layers.kv_heads]  # before they were shared
        keys, _ = self.k_features(own, scaling)
        return self.q_features(q, scaling).exp(), self.shared(keys.exp())


class DeltaRule(Additive):
    """The same features under the delta rule: S ← S + β φ(k) (v − Sᵀφ(k))ᵀ, one step of online regression of values on
    keys (arXiv 2406.06484; the view of arXiv 2501.12352). Features have length 1, β = σ(x W_β) a head."""

    def __init__(self, kernel: Kernel, layers: Layers) -> None:
        super().__init__(kernel, layers)
        self.rate = Gate(layers, layers.kv_heads, 1, bias=0.0)
        self.out = GatedNorm(layers, gate=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, x: Tensor) -> Tensor:
        fq, fk = (F.normalize(f, dim=-1) for f in self.features(q, k, scaling))
        return self.out(delta_rule(fq, fk, v, self.shared(self.rate(x)).sigmoid()), x)


class Gate(nn.Module):
    """A linear map of the hidden states [B, N, hidden] to [B, heads, N, size]."""

    def __init__(self, layers: Layers, heads: int, size: int, bias: float) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.randn(heads * size, layers.hidden_size) * 0.02)
        self.bias = nn.Parameter(torch.full((heads * size,), bias))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GatedNorm(nn.Module):
    """A norm a head with a learned scale and shift, and an output gate SiLU(x W) if asked for."""

    def __init__(self, layers: Layers, gate: bool) -> None:
        super().__init__()
        shape = (layers.heads, 1, layers.value_dim)
        self.weight, self.bias = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.gate = Gate(layers, layers.heads, layers.value_dim, bias=1.0) if gate else None

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        out = F.layer_norm(out, out.shape[-1:]) * self.weight + self.bias
        return out if self.gate is None else out * F.silu(self.gate(x))


def gated(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, by_slot: bool = False, chunk: int = 16) -> Tensor:
    """Σ_j≤i Σ_f q_if k_jf e^{c_if − c_jf} v_j, with c the running sum of log_gate [B, H, N, F] (GLA, arXiv 2312.06635).

    by_slot: the first pass of gated slot attention: ``q`` is what is written to each slot, ``k`` the keys, ``v`` the
    queries; returns Σ_j (v_i·k_j) q_jm e^{c_im − c_jm}, [B, H, N, M]. Gates below e^{−40 / chunk} count as that.
    """
    length, outputs = k.shape[2], []
    state: Tensor | float = 0.0
    for start in range(0, length, chunk):
        n = slice(start, min(start + chunk, length))
        c = log_gate[:, :, n].clamp_min(-40 / chunk).cumsum(2)  # within a chunk, e^{−c} stays a float32 number
        grown, left = c.exp(), (c[:, :, -1:] - c).exp()
        if by_slot:
            written, keys, queries = q[:, :, n], k[:, :, n], v[:, :, n]
            inside = (queries @ keys.mT).tril() @ (written / grown)
            outputs.append(grown * (inside + queries @ state if start else inside))
            state = (state * grown[:, :, -1:] if start else 0) + keys.mT @ (written * left)
        else:
            fq, fk = q[:, :, n] * grown, k[:, :, n]
            inside = (fq @ (fk / grown).mT).tril() @ v[:, :, n]
            outputs.append(inside + fq @ state if start else inside)
            state = (state * grown[:, :, -1:].mT if start else 0) + (fk * left).mT @ v[:, :, n]
    return torch.cat(outputs, 2)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, chunk: int = 32) -> Tensor:
    """S_i = S_{i−1} + β_i k_i (v_i − S_{i−1}ᵀ k_i)ᵀ, o_i = S_iᵀ q_i, chunk by chunk (arXiv 2406.06484, section 3.2)."""
    outputs = []
    state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    for start in range(0, k.shape[2], chunk):
        n = slice(start, min(start + chunk, k.shape[2]))
        kc, b = k[:, :, n], beta[:, :, n]
        system = torch.eye(kc.shape[2], dtype=k.dtype, device=k.device) + (b * kc @ kc.mT).tril(-1)
        update = torch.linalg.solve_triangular(system, b * (v[:, :, n] - kc @ state), upper=False)
        outputs.append(q[:, :, n] @ state + (q[:, :, n] @ kc.mT).tril() @ update)
        state = state + kc.mT @ update
    return torch.cat(outputs, 2)


def _indices(q: Tensor) -> tuple[Tensor, Tensor]:
    n = torch.arange(q.shape[2], device=q.device)
    return n[:, None], n[None, :]


def _normalized(weights: Tensor, v: Tensor, least: float = 1e-9) -> Tensor:
    weights = weights.tril()
    return weights @ v / weights.sum(-1, keepdim=True).clamp_min(least)


BASELINES: dict[str, Any] = {
    "sinks": Sinks,
    "hedgehog": Hedgehog,
    "lolcats": LoLCATs,
    "lola": LoLA,
    "t2r": T2R,
    "performer": Performer,
    "retnet": RetNet,
    "regla": ReGLA,
    "gsa": GatedSlots,
    "additive": Additive,
    "delta": DeltaRule,
}
