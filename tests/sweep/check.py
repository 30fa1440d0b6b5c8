"""Checks a converted model in a process that has torch and transformers but not this project.

Run as `python -I check.py` it serves such jobs (`forks`). Sequences are far longer than the window of 8 and the
kernel's chunk of 64, and deleting the far part must show.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.modules["dijiang_convert"] = None  # type: ignore[assignment]  # importing it fails from here on
sys.modules["fla"] = None  # type: ignore[assignment]  # transformers would hand CPU tensors to its kernels
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from feed import PIECES, fed  # noqa: E402
from forks import Answer, serve  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

SECONDS = 180
TOLERANCE = 1e-4
SOURCE_DIFFERS = 0.1  # beyond what rounding explains
WINDOW = 8
NEW = 12
Numbers = dict[str, float]


def check(folder: str, layouts: list[str], source: Answer, window: int | None = None) -> Answer:
    """Runs every check of one converted type.

    Args:
        folder: what `make` wrote.
        layouts: of the source; all checks run on the first, the others must load as the same model.
        source: what `make` says of the source's own answers with padding and with a cache. A converted model may
            differ as far, where that is more than rounding: its recurrent layers are the source's.
        window: of the source's layers that were converted, where they had a sliding one.

    Returns:
        ``failures``: check and what was wrong, empty if all is well; ``figures``: the largest differences seen.
    """
    return run(CHECKS, Subject(Path(folder), layouts, source, window))


def run(checks: dict[str, Callable[[Any], Numbers]], subject: Any) -> Answer:
    """Failures and figures of all checks."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failures, figures = {}, {}
    for name, function in checks.items():
        try:
            figures |= function(subject)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if name == "loads":
                break
    return {"failures": failures, "figures": {name: float(f"{value:.2g}") for name, value in figures.items()}}


class Subject:
    """What is checked. ``unit``: differences of logits are given in it: their standard deviation, at most 1."""

    model: Any
    unit: float = 1.0

    def __init__(self, folder: Path, layouts: list[str], source: Answer, window: int | None) -> None:
        self.folder, self.layouts, self.source, self.window = folder, layouts, source, window
        reference = load_file(folder / "reference.safetensors")
        self.state = {name[6:]: tensor for name, tensor in reference.items() if name.startswith("state.")}
        self.ids, self.mask = reference["ids"], reference["mask"]
        self.logits, self.padded, self.alone = (reference[name] for name in ("logits", "padded", "alone"))
        self.padding = int((self.mask[0] == 0).sum())

    def converted(self, layout: str | None = None) -> Path:
        return self.folder / f"{layout or self.layouts[0]}-converted"

    def difference(self, a: Tensor, b: Tensor) -> float:
        if a.shape != b.shape:
            raise AssertionError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AssertionError("logits are not finite")
        return (a - b).abs().max().item() / self.unit


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model(input_ids=ids, use_cache=False, **options).logits


def kernels(model: Any) -> list[Any]:
    return [module.dijiang for module in model.modules() if hasattr(module, "dijiang")]


def with_kernel(model: Any, **changes: Any) -> Any:
    """A copy whose kernels are set otherwise."""
    changed = copy.deepcopy(model)
    for kernel in kernels(changed):
        kernel.resize(dataclasses.replace(kernel.kernel, **changes))
    return changed


def within(value: float, what: str, limit: float = TOLERANCE) -> float:
    if not value <= limit:
        raise AssertionError(f"{what} differ by {value:.3g}")
    return value


# ------------------------------------------------------------------------------------------------------------ checks


def loads(s: Subject) -> Numbers:
    s.model = load(s.converted())
    if not (type(s.model).__name__.startswith("DiJiang") and kernels(s.model)):
        raise AssertionError(f"{type(s.model).__name__} has no kernels")
    full = logits_of(s.model, s.ids)
    s.unit = min(full.std().item(), 1.0)
    if not s.unit > 1e-4:
        raise AssertionError("logits are all the same")
    return {"spread": full.std().item()}


def keeps_bytes(s: Subject) -> Numbers:
    """Of every tensor in the source's files."""
    for layout in s.layouts:
        source, found = tensors(s.folder / layout), tensors(s.converted(layout))
        for name, tensor in source.items():
            if not torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8)):
                raise AssertionError(f"{name} of layout {layout} changed on disk")
        added = found.keys() - source.keys()
        if not added or not all(".dijiang." in name for name in added):
            raise AssertionError(f"{min(added, default='nothing')} was added")
    return {}


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                found[name] = tensor.reshape(1) if tensor.dim() == 0 else tensor
    return found


def loads_the_same(s: Subject) -> Numbers:
    """Every weight is the source's after loading, from every layout. (Experts that a key mapping missed would be
    random.)"""
    for layout in s.layouts:
        model = s.model if layout == s.layouts[0] else load(s.converted(layout))
        same_state({k: v for k, v in model.state_dict().items() if ".dijiang." not in k}, s.state)
    return {}


def same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if found.keys() != expected.keys():
        raise AssertionError(f"{min(found.keys() ^ expected.keys())} is on one side alone")
    for name, tensor in found.items():
        if not torch.equal(tensor, expected[name]):
            raise AssertionError(f"{name} differs")


def equals_softmax(s: Subject) -> Numbers:
    """With a window as long as the text nothing is far: then it is the source's attention, all that it does kept. So
    it is with a sliding layer's own window and no far part."""
    if s.window is None:
        model = with_kernel(s.model, window=4096)
    else:  # blocks of one token: the query's own, and as many before it
        model = with_kernel(s.model, window=s.window - 1, block=1, sinks=0, memory=0, far=False)
    whole = within(
        s.difference(logits_of(model, s.ids), s.logits), "the source's and a long window's logits", TOLERANCE
    )
    padded = logits_of(model, s.ids * s.mask, attention_mask=s.mask)
    same = s.difference(padded[s.mask.bool()], s.padded[s.mask.bool()])
    # Where positions count padding in the source, they may leave it out here: then the row is as if alone.
    alone = s.difference(padded[:1, s.padding :], s.alone) if s.source["padding_shifts"] else same
    within(min(same, alone), "the source's and a long window's logits of a padded batch", TOLERANCE)
    return {"softmax": whole}


def in_float64_too(check: Callable[[Subject, Any], Numbers]) -> Callable[[Subject], Numbers]:
    """The check, and where it fails once more in float64: there rounding hardly ever chooses another of two keys with
    almost the same score, or makes another of 255 steps of a number that is kept in 8 bits."""

    @functools.wraps(check)
    def checked(s: Subject) -> Numbers:
        try:
            return check(s, s.model)
        except AssertionError:
            return check(s, copy.deepcopy(s.model).double())

    return checked


def cached_equals_full(s: Subject) -> Numbers:
    if s.source["cached"][0] > SOURCE_DIFFERS:
        raise AssertionError("the source itself differs with a cache")
    return in_float64_too(cached_differences)(s)


def cached_differences(s: Subject, model: Any) -> Numbers:
    full = logits_of(model, s.ids)
    worst = 0.0
    for sizes, own in zip(PIECES, s.source["cached"], strict=True):
        if own > SOURCE_DIFFERS:  # it can't go on so, as Jamba with several tokens at once
            continue
        difference = s.difference(fed(model, s.ids, sizes, s.source["positions"]), full)
        within(difference, "cached and full logits", max(TOLERANCE, 2 * own))
        worst = max(worst, difference)
    return {"cached": worst}


@in_float64_too
def long_prompts(s: Subject, model: Any) -> Numbers:
    """Which the model may work on piece by piece: here from 64 tokens on."""
    code = sys.modules[type(model).__module__]
    whole, padded = logits_of(model, s.ids), logits_of(model, s.ids * s.mask, attention_mask=s.mask)
    length, code.CHUNK = code.CHUNK, 64  # type: ignore[attr-defined]
    try:
        pieces, real = s.difference(logits_of(model, s.ids), whole), s.mask.bool()
        found = logits_of(model, s.ids * s.mask, attention_mask=s.mask)
    finally:
        code.CHUNK = length  # type: ignore[attr-defined]
    worst = max(pieces, s.difference(found[real], padded[real]))
    return {"chunks": within(worst, "logits of a long prompt piece by piece and as a whole")}


@in_float64_too
def padding_changes_nothing(s: Subject, model: Any) -> Numbers:
    real = s.mask.bool()
    padded = logits_of(model, s.ids * s.mask, attention_mask=s.mask)[real]
    worst = 0.0
    if not s.source["padding_shows"]:
        worst = s.difference(padded, logits_of(model, torch.where(real, s.ids, 7), attention_mask=s.mask)[real])
        within(worst, "logits with one padding and another")
    if not s.source["padding_shifts"]:
        if model.config.get_text_config(decoder=True) is not model.config:  # whose positions are not told by the mask:
            model = copy.deepcopy(model)  # keys of a row are rounded as they were rotated, so the same has none
            for kernel in kernels(model):
                kernel.resize(dataclasses.replace(kernel.kernel, sinks=0, memory=0))
            padded = logits_of(model, s.ids * s.mask, attention_mask=s.mask)[real]
        alone = [logits_of(model, row[keep][None])[0] for row, keep in zip(s.ids, real, strict=True)]
        worst = max(worst, s.difference(padded, torch.cat(alone)))
        within(worst, "logits in a padded batch and alone", max(TOLERANCE, 2 * s.source["padding"]))
    return {"padding": worst}


def generates(s: Subject) -> Numbers:
    """Greedily: with and without a cache, and from a padded batch."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    ids, mask = s.ids * s.mask, s.mask
    cached = s.model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)
    plain = s.model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    if cached.shape[1] != ids.shape[1] + NEW or not torch.equal(cached, plain):
        raise AssertionError("greedy texts with and without a cache differ")
    if not s.model._is_stateful:  # transformers makes no static cache for all that is recurrent
        static = s.model.generate(input_ids=ids, attention_mask=mask, cache_implementation="static", **options)
        if not torch.equal(static, plain):
            raise AssertionError("greedy texts with a static and without a cache differ")
    if not s.source["padding_shifts"]:
        alone = s.model.generate(input_ids=ids[:1, s.padding :], use_cache=True, **options)
        if not torch.equal(cached[:1, s.padding :], alone):
            raise AssertionError("greedy texts in a padded batch and alone differ")
    return {}


def far_part_counts(s: Subject) -> Numbers:
    """Deleting it changes what lies beyond the window, by far more than any tolerance, and nothing before."""
    full, near = logits_of(s.model, s.ids), logits_of(with_kernel(s.model, far=False), s.ids)
    within(s.difference(near[:, :WINDOW], full[:, :WINDOW]), "logits inside the window, without the far part,")
    beyond = min(s.difference(near[:, end - 20 : end], full[:, end - 20 : end]) for end in (60, 110, 160))
    if not beyond > 100 * TOLERANCE:
        raise AssertionError(f"deleting the far part changes no more than {beyond:.3g}")
    return {"far": beyond}


def learns(s: Subject) -> Numbers:
    """Every kernel parameter gets a gradient in a training step."""
    model = copy.deepcopy(s.model).train()
    out = model(input_ids=s.ids, labels=s.ids)
    loss = (
        out.loss if out.loss is not None else F.cross_entropy(out.logits[:, :-1].flatten(0, 1), s.ids[:, 1:].flatten())
    )
    loss.backward()
    smallest = float("inf")
    for name, parameter in model.named_parameters():
        if ".dijiang." in name:
            if parameter.grad is None or not parameter.grad.isfinite().all():
                raise AssertionError(f"{name} has no finite gradient")
            smallest = min(smallest, parameter.grad.abs().max().item())
            if not smallest > 1e-8:
                raise AssertionError(f"{name} has a gradient of {smallest:.3g}")
    return {"gradient": smallest}


def saves(s: Subject) -> Numbers:
    """Saved and loaded again it is the same to the bit."""
    again = s.folder / "again"
    s.model.save_pretrained(again)
    model = load(again)
    same_state(model.state_dict(), s.model.state_dict())
    if not torch.equal(logits_of(model, s.ids), logits_of(s.model, s.ids)):
        raise AssertionError("logits differ after saving and loading")
    return {}


CHECKS: dict[str, Callable[[Subject], Numbers]] = {
    function.__name__: function
    for function in (
        loads, keeps_bytes, loads_the_same, equals_softmax, cached_equals_full, long_prompts, padding_changes_nothing,
        generates, far_part_counts, learns, saves,
    )
}  # fmt: skip


if __name__ == "__main__":
    serve(check, SECONDS)
