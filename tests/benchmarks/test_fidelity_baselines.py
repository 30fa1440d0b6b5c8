"""The fidelity lab: baselines against plain recurrences, causal and trainable, and the lab's whole path.

Shape legend: B batch, H query heads, G key/value heads, N tokens, D head_dim, V value head_dim, F features, M slots.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fidelity import lab, report
from benchmarks.fidelity.baselines import BASELINES, Baseline, delta_rule, gated
from benchmarks.fidelity.positions import lengths, shifts
from dijiang_convert import convert
from dijiang_convert.checkpoint.loading import load_any, load_tokenizer
from dijiang_convert.data.demo_text import documents
from dijiang_convert.data.rows import Rows
from dijiang_convert.demo import MODEL
from dijiang_convert.measure.recall import recall
from dijiang_convert.modeling.attention import Call
from dijiang_convert.modeling.configuration_dijiang import Kernel, Layers
from dijiang_convert.modeling.table import Logits
from dijiang_convert.training import schedule

WINDOW, LENGTH = 8, 41
LAYERS = Layers("Attention", "attention", (0,), heads=4, kv_heads=2, head_dim=8, value_dim=6, hidden_size=24)
BEYOND_A_CHUNK = (1, 17, 63)
ROWS = ("window-only:window=16,block=16", "lolcats:window=16,block=16")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------- recurrences


def one_by_one(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    state, outputs = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1]), []
    for i in range(k.shape[2]):
        state = log_gate[:, :, i, :, None].exp() * state + k[:, :, i, :, None] * v[:, :, i, None, :]
        outputs.append((q[:, :, i, :, None] * state).sum(-2))
    return torch.stack(outputs, 2)


def one_by_one_by_slot(written: Tensor, keys: Tensor, queries: Tensor, log_gate: Tensor) -> Tensor:
    slots, outputs = torch.zeros(*keys.shape[:2], written.shape[-1], keys.shape[-1]), []
    for i in range(keys.shape[2]):
        slots = log_gate[:, :, i, :, None].exp() * slots + written[:, :, i, :, None] * keys[:, :, i, None, :]
        outputs.append((slots * queries[:, :, i, None, :]).sum(-1))
    return torch.stack(outputs, 2)


def one_by_one_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    state, outputs = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1]), []
    for i in range(k.shape[2]):
        error = v[:, :, i] - (k[:, :, i, :, None] * state).sum(-2)
        state = state + beta[:, :, i, :, None] * k[:, :, i, :, None] * error[:, :, None, :]
        outputs.append((q[:, :, i, :, None] * state).sum(-2))
    return torch.stack(outputs, 2)


def assert_same(fast: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values, and gradients of every input."""
    inputs = tuple(x.requires_grad_() for x in inputs)
    out, expected = fast(*inputs), plain(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    weights = normal(*out.shape, seed=9)
    found, wanted = (torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True) for y in (out, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", BEYOND_A_CHUNK)
def test_gated_is_its_recurrence(length: int) -> None:
    q, k, v = normal(2, 3, length, 10), normal(2, 3, length, 10, seed=1), normal(2, 3, length, 6, seed=2)
    log_gate = F.logsigmoid(2 + normal(2, 3, length, 10, seed=3))
    assert_same(gated, one_by_one, q, k, v, log_gate)


@pytest.mark.parametrize("length", BEYOND_A_CHUNK)
def test_gated_by_slot_is_its_recurrence(length: int) -> None:
    written, keys, queries = normal(2, 3, length, 10), normal(2, 3, length, 6, seed=1), normal(2, 3, length, 6, seed=2)
    log_gate = F.logsigmoid(2 + normal(2, 3, length, 10, seed=3))
    assert_same(lambda *x: gated(*x, by_slot=True), one_by_one_by_slot, written, keys, queries, log_gate)


@pytest.mark.parametrize("length", BEYOND_A_CHUNK)
def test_delta_rule_is_its_recurrence(length: int) -> None:
    q, v = normal(2, 3, length, 10), normal(2, 3, length, 6, seed=2)
    k, beta = F.normalize(normal(2, 3, length, 10, seed=1), dim=-1), normal(2, 3, length, 1, seed=3).sigmoid()
    assert_same(delta_rule, one_by_one_delta, q, k, v, beta)


# -------------------------------------------------------------------------------------------------- every baseline


def baseline(name: str, window: int = WINDOW, block: int | None = None, memory: int = 2) -> Any:
    """A baseline whose parameters have moved from their start."""
    torch.manual_seed(0)
    module = BASELINES[name](Kernel(window=window, block=block or window, memory=memory), LAYERS)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter += 0.2 * normal(*parameter.shape, seed=i)
    lab.remember(module, True)
    return module


def inputs() -> list[Tensor]:
    """q [B, H, N, D], k [B, G, N, D], v [B, G, N, V] and hidden states [B, N, hidden]."""
    sizes = [(LAYERS.heads, LAYERS.head_dim), (LAYERS.kv_heads, LAYERS.head_dim), (LAYERS.kv_heads, LAYERS.value_dim)]
    tensors = [normal(2, heads, LENGTH, size, seed=i) for i, (heads, size) in enumerate(sizes)]
    return [*tensors, normal(2, LENGTH, LAYERS.hidden_size, seed=5)]


def attend(module: Baseline, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    call = Call(cache=None, hidden_states=x, cos_sin=None, logits=Logits(LAYERS.head_dim**-0.5))
    return module(q, k, v, None, call)


def changed(module: Baseline, tokens: slice) -> Tensor:
    """How much each token's output [N] changes if these tokens are others."""
    plain = inputs()
    others = [x.clone() for x in plain]
    for x in others:
        x[..., tokens, :] = x[..., tokens, :].flip(0) + 1
    with torch.no_grad():
        difference = attend(module, *plain) - attend(module, *others)
    return difference.abs().amax((0, 1, 3))


@pytest.mark.parametrize("name", BASELINES)
def test_no_baseline_sees_later_tokens(name: str) -> None:
    change = changed(baseline(name), slice(23, None))
    assert change[:23].max() < 1e-5
    assert change[23:].min() > 1e-3


def test_performers_first_tokens_do_not_shrink_before_keys_with_larger_features() -> None:
    q, k, v, x = inputs()
    k[:, :, :30] *= 4
    with torch.no_grad():
        alone = attend(baseline("performer"), q[:, :, :30], k[:, :, :30], v[:, :, :30], x[:, :30])
        found = attend(baseline("performer"), q, k, v, x)[:, :, :30]
    assert (found - alone).abs().max() < 1e-4


@pytest.mark.parametrize("name", BASELINES)
def test_all_but_sinks_remember_beyond_the_window(name: str) -> None:
    module = baseline(name)
    change, first = changed(module, slice(5, 6)), changed(module, slice(1, 2))
    assert change[5 : 5 + WINDOW].min() > 1e-4
    assert first[-1] > 1e-4
    if name == "sinks":
        assert change[5 + WINDOW :].max() == 0
    else:
        assert change[-1] > 1e-4


@pytest.mark.parametrize("name", ["sinks", "lolcats", "lola"])
def test_a_window_over_everything_is_softmax(name: str) -> None:
    q, k, v, x = inputs()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend(baseline(name, window=LENGTH), q, k, v, x), expected, rtol=1e-4, atol=1e-5)


def test_lola_is_lolcats_with_the_worst_recalled_keys_exact() -> None:
    """Token by token, with rows of the window, of the memory and of the state told apart by hand."""
    q, k, v, _ = inputs()
    block = memory = 4
    module = baseline("lola", block=block, memory=memory)
    fq, fk = module.features(q, module.q_map), module.features(k, module.k_map)
    expected = torch.zeros(*q.shape[:3], LAYERS.value_dim)
    for row, head in itertools.product(range(2), range(LAYERS.heads)):
        group = head // (LAYERS.heads // LAYERS.kv_heads)
        keys, values, features = k[row, group], v[row, group], fk[row, group]
        exact: list[int] = []
        state: list[int] = []
        for i in range(LENGTH):
            start = i // block * block
            if i == start:
                eligible = [*exact, *(j for j in range(start - WINDOW - block, start - WINDOW) if j >= 0)]
                weights = features[eligible] @ features[state].T
                error = weights @ values[state] / weights.sum(-1, keepdim=True).clamp_min(1e-9) - values[eligible]
                worst = error.square().sum(-1).argsort(dim=-1, descending=True, stable=True).tolist()
                exact = [eligible[n] for n in worst[:memory]]
                state += [eligible[n] for n in worst[memory:]]
            near = [*exact, *range(max(0, start - WINDOW), i + 1)]
            scores = keys[near] @ q[row, head, i] * LAYERS.head_dim**-0.5
            weights = (scores - scores[len(exact) :].max()).exp() * module.window_factor[head].sigmoid()
            far = features[state] @ fq[row, head, i]
            total = weights.sum() + far.sum()
            expected[row, head, i] = (weights @ values[near] + far @ values[state]) / total
    with torch.no_grad():
        torch.testing.assert_close(attend(module, *inputs()), expected, rtol=1e-4, atol=1e-5)


def test_lola_trains_as_lolcats() -> None:
    lola, lolcats = baseline("lola", block=4), baseline("lolcats", block=4)
    assert (attend(lola, *inputs()) - attend(lolcats, *inputs())).abs().max() > 1e-3
    lab.remember(lola, False)
    torch.testing.assert_close(attend(lola, *inputs()), attend(lolcats, *inputs()), rtol=0, atol=0)


@pytest.mark.parametrize("name", BASELINES)
def test_gradients_reach_every_parameter(name: str) -> None:
    module = baseline(name)
    parameters = dict(module.named_parameters())
    assert bool(parameters) == (name not in ("sinks", "performer"))
    tensors = [x.requires_grad_() for x in inputs()]
    out = attend(module, *tensors)
    (out * normal(*out.shape, seed=9)).sum().backward()
    for parameter_name, parameter in parameters.items():
        assert parameter.grad is not None, parameter_name
        assert (parameter.grad != 0).float().mean() > 0.9, parameter_name
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.any() for x in tensors[:3])


# ---------------------------------------------------------------------------------------------------- the whole path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in documents(split)[:8]))
    return folder


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's file of two rows; what is in it already is not run again."""
    out = tmp_path_factory.mktemp("lab") / "runs.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "LEAST_STEPS", 4)
        options = ["--data", str(text), "--out", str(out), "--seq-len", "64", "--tokens", "4000"]
        options += ["--eval-tokens", "1500", "--distances", "8", "48", "64"]
        patch.setattr(sys, "argv", ["lab", str(MODEL), *ROWS[:1], *options])
        lab.main()
        (first,) = out.read_text().splitlines()
        patch.setattr(sys, "argv", ["lab", str(MODEL), *ROWS, *options])
        lab.main()
    assert out.read_text().startswith(first + "\n")
    return out


def test_a_run_tells_what_training_was_worth(runs: Path) -> None:
    loaded = report.load([runs])
    assert tuple(run["row"] for run in loaded) == ROWS
    found = {run["row"]: run for run in loaded}
    for run in found.values():
        assert run["ratio"] == pytest.approx(run["perplexity"] / run["original"])
        assert run["kl"] > 0
        assert 3000 < run["tokens"] < 6000
        assert set(run["recall"]) == {"8", "48"}  # 64 tokens ago is before the row
    alone, lolcats = (found[row] for row in ROWS)
    assert alone["parameters"] == 0
    assert lolcats["parameters"] == 4 * (2 * 2 * 64 * 64 + 2)  # layers of 2 heads of 64, and a weight a head
    assert alone["transfer_errors"]["untrained"] != lolcats["transfer_errors"]["untrained"]
    before, after = (sum(lolcats["transfer_errors"][key]) for key in ("untrained", "trained"))
    assert after < 0.7 * before
    assert lolcats["kl"] < 0.7 * lolcats["untrained"]["kl"]


def test_the_report_shows_every_run(runs: Path, tmp_path: Path) -> None:
    loaded = report.load([runs])
    header, _, *lines = (line.strip("| ").split(" | ") for line in report.table(loaded).splitlines())
    assert tuple(header) == report.COLUMNS
    cells = {line[0]: dict(zip(header, line, strict=False)) for line in lines}
    assert set(cells) == {f"`{row}`" for row in ROWS}
    alone, lolcats = (cells[f"`{row}`"] for row in ROWS)
    assert not alone["gap closed"].strip()
    ratios = {run["row"]: run["ratio"] for run in loaded}
    closed = 1 - (ratios[ROWS[1]] - 1) / (ratios[ROWS[0]] - 1)
    assert lolcats["gap closed"] == f"{closed:.0%}"
    assert lolcats["recall"].startswith("8: ")
    report.draw(loaded, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_rows_are_compared_with_ours_of_the_same_sizes() -> None:
    def run(row: str, ratio: float, kl: float) -> dict[str, Any]:
        same = {"seed": 0, "budget": 100_000, "top1": 0.5, "untrained": {"ratio": 2.0}, "recall": {}}
        return {**same, "row": row, "ratio": ratio, "kl": kl, "transfer_errors": {"trained": []}}

    small, large = "window=16,block=16,memory=0", "window=16,block=16,memory=16"
    runs = [
        run(f"window-only:{small}", 1.4, 0.4), run(f"frequency:{small}", 1.2, 0.2), run(f"frequency:{large}", 1.1, 0.1),
        run(f"lolcats:{small}", 1.3, 0.3), run("pure", 1.5, 0.5), run("hedgehog:seed=1", 1.6, 0.7),
    ]  # fmt: skip
    header, _, *lines = (line.strip("|").split("|") for line in report.table(runs).splitlines())
    names = [name.strip() for name in header]
    cells = {line[0].strip(" `"): dict(zip(names, (cell.strip() for cell in line), strict=True)) for line in lines}
    behind = {row: found["behind: KL"] for row, found in cells.items()}
    assert behind == {
        f"window-only:{small}": "0.2000", f"frequency:{small}": "", f"frequency:{large}": "",
        f"lolcats:{small}": "0.1000", "pure": "", "hedgehog:seed=1": "0.2000",
    }  # fmt: skip
    closed = {row: found["gap closed"] for row, found in cells.items() if found["gap closed"]}
    assert closed == {f"frequency:{small}": "50%", f"frequency:{large}": "75%", f"lolcats:{small}": "25%"}


def test_the_bare_window_keeps_no_first_tokens(tmp_path: Path) -> None:
    args = argparse.Namespace(model=str(MODEL), seq_len=64, set=[])
    model, stages = lab.build(args, "bare-window:window=16,block=16", tmp_path / "converted", seed=0)
    kernel = model.config.dijiang["kernel"]
    assert (kernel["window"], kernel["sinks"], kernel["memory"], kernel["far"]) == (16, 0, 0, False)
    assert [stage.name for stage in stages] == ["distill"]


def held_out(length: int) -> Tensor:
    """Three rows of tokens."""
    ids = load_tokenizer(str(MODEL))(documents("validation")[0][:4000], return_tensors="pt").input_ids
    return ids[:, : 3 * length].view(3, length)


def test_without_distances_the_lab_measures_a_repeated_passage_as_eval_does() -> None:
    ids = held_out(320)
    rows = Rows(ids, torch.ones_like(ids))
    found = lab.recall(load_any(str(MODEL)).eval(), rows, [])
    assert found.keys() == {"256"}  # of the distances of `dijiang eval --recall`, the one that fits
    assert found["256"] == dataclasses.asdict(recall(load_any(str(MODEL)).eval(), ids)[256])


def test_only_rotated_features_notice_that_positions_are_shifted(tmp_path: Path) -> None:
    original, ids = load_any(str(MODEL)).eval(), held_out(128)
    for found in shifts(original, ids, [1, 100, 1000]).values():
        assert found["logits"] < 1e-3
        assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-6)
    convert(str(MODEL), tmp_path / "pure", recipe="pure")
    moved = shifts(load_any(str(tmp_path / "pure")).eval(), ids, [100])["100"]
    assert moved["logits"] > 1e-2
    assert abs(moved["perplexity_ratio"] - 1) > 1e-5


def test_perplexity_by_position_is_that_of_the_logits() -> None:
    model, ids = load_any(str(MODEL)).eval(), held_out(64)
    expected = math.exp(model(input_ids=ids, labels=ids).loss.item())  # of the mean over all next tokens
    assert math.prod(lengths(model, ids, parts=7)) ** (1 / 7) == pytest.approx(expected, rel=1e-4)
