"""Checks a converted encoder in a process that has torch and transformers but not this project, as `check` does it for
decoders. Texts and images are far longer than the window of 8.

Run as `python -I check_encoder.py` it serves such jobs (`forks`).
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from check import SECONDS, TOLERANCE, Numbers, kernels, run, same_state, tensors, with_kernel, within

# isort: split
import torch
import transformers
from feed import output
from forks import Answer, serve
from safetensors.torch import load_file
from torch import Tensor


def check(folder: str, layouts: list[str], padding_shifts: bool, rounding: float) -> Answer:
    """Runs every check of one converted type; arguments are what `encoders.make` answers, the result as in `check`."""
    return run(CHECKS, Subject(Path(folder), layouts, padding_shifts, rounding))


class Subject:
    """What is checked. ``unit``: differences are given in it: the spread of the source's output, at most 1.
    ``tolerance``: more where the source's own numbers are less exact."""

    model: Any

    def __init__(self, folder: Path, layouts: list[str], padding_shifts: bool, rounding: float) -> None:
        self.folder, self.layouts, self.padding_shifts = folder, layouts, padding_shifts
        reference = load_file(folder / "reference.safetensors")
        self.state = {name[6:]: tensor for name, tensor in reference.items() if name.startswith("state.")}
        self.inputs = {name[6:]: tensor for name, tensor in reference.items() if name.startswith("input.")}
        self.mask = self.inputs.pop("attention_mask", None)
        self.whole, self.padded, self.alone = (reference.get(name) for name in ("whole", "padded", "alone"))
        self.unit = min(self.whole.std().item(), 1.0)
        self.tolerance = max(TOLERANCE, 2 * rounding / self.unit)

    def converted(self, layout: str | None = None) -> Path:
        return self.folder / f"{layout or self.layouts[0]}-converted"

    def load(self, folder: Path | None = None, auto: str | None = None) -> Any:
        folder = folder or self.converted()
        config = json.loads((folder / "config.json").read_text())
        named = {name.rpartition(".")[2]: each for each, name in config["auto_map"].items()}
        own = getattr(transformers, auto or named[config["architectures"][0]])
        return own.from_pretrained(folder, trust_remote_code=True).eval()

    def difference(self, a: Tensor, b: Tensor) -> float:
        if a.shape != b.shape:
            raise AssertionError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise AssertionError("outputs are not finite")
        return (a - b).abs().max().item() / self.unit


# ------------------------------------------------------------------------------------------------------------ checks


def loads(s: Subject) -> Numbers:
    s.model = s.load()
    if not (type(s.model).__name__.startswith("DiJiang") and kernels(s.model)):
        raise AssertionError(f"{type(s.model).__name__} has no kernels")
    if not s.unit > 1e-4:
        raise AssertionError("outputs are all the same")
    return {}


def keeps_bytes(s: Subject) -> Numbers:
    for layout in s.layouts:
        source, found = tensors(s.folder / layout), tensors(s.converted(layout))
        changed = [n for n, t in source.items() if not torch.equal(t.view(torch.uint8), found[n].view(torch.uint8))]
        added = found.keys() - source.keys()
        if changed or not added or not all(".dijiang." in name for name in added):
            raise AssertionError(f"{[*changed, *sorted(added)][0]} changed or was added")
    return {}


def loads_the_same(s: Subject) -> Numbers:
    for layout in s.layouts:
        model = s.load(s.converted(layout))
        same_state({k: v for k, v in model.state_dict().items() if ".dijiang." not in k}, s.state)
    return {}


def has_every_head(s: Subject) -> Numbers:
    """Each Auto class that transformers has for the source loads, on the same kernels."""
    heads = json.loads((s.converted() / "config.json").read_text())["auto_map"]
    expected = {tensor.double().sum().item() for name, tensor in s.model.state_dict().items() if ".dijiang." in name}
    tried = 0
    for auto in heads.keys() - {"AutoConfig"}:
        try:
            getattr(transformers, auto).from_pretrained(s.folder / s.layouts[0])
        except Exception:  # the source's config is not one for this head
            continue
        tried += 1
        state = s.load(auto=auto).state_dict()
        if {tensor.double().sum().item() for name, tensor in state.items() if ".dijiang." in name} != expected:
            raise AssertionError(f"{auto} has other kernels")
    if tried == 0:
        raise AssertionError("no head of the source loads")
    return {"heads": tried}


def equals_softmax(s: Subject) -> Numbers:
    """With a window as long as the text nothing is far: then it is the source's attention."""
    model = with_kernel(s.model, window=4096)
    worst = s.difference(output(model, **s.inputs), s.whole)
    within(worst, "the source's and a long window's outputs", s.tolerance)
    if s.mask is not None:
        real = s.mask.bool()
        padded = output(model, input_ids=s.inputs["input_ids"] * s.mask, attention_mask=s.mask)
        worst = max(worst, s.difference(padded[real], s.padded[real]))
    return {"softmax": within(worst, "the source's and a long window's outputs of a padded batch", s.tolerance)}


def padding_changes_nothing(s: Subject) -> Numbers:
    if s.mask is None or s.padding_shifts:
        return {}
    ids, real = s.inputs["input_ids"], s.mask.bool()
    padded = output(s.model, input_ids=ids * s.mask, attention_mask=s.mask)
    alone = [output(s.model, input_ids=row[keep][None])[0] for row, keep in zip(ids, real, strict=True)]
    worst = s.difference(padded[real], torch.cat(alone))
    return {"padding": within(worst, "outputs in a padded batch and alone", s.tolerance)}


def far_part_counts(s: Subject) -> Numbers:
    """Deleting it changes every output, on both sides of the text, by far more than any tolerance."""
    change = (output(with_kernel(s.model, far=False), **s.inputs) - output(s.model, **s.inputs)).abs() / s.unit
    least = change.flatten(2).amax(2).min().item() if change.dim() > 2 else change.max().item()
    if not least > 10 * TOLERANCE:
        raise AssertionError(f"deleting the far part changes no more than {least:.3g}")
    return {"far": least}


def learns(s: Subject) -> Numbers:
    """Every kernel parameter gets a gradient."""
    model = copy.deepcopy(s.model).train()
    torch.manual_seed(0)
    out = model(**s.inputs)
    found = out.logits if getattr(out, "logits", None) is not None else out[0]
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".dijiang." in name}
    for name, gradient in gradients.items():
        if gradient is None or not gradient.isfinite().all() or not gradient.abs().max() > 1e-8:
            raise AssertionError(f"{name} has no gradient")
    return {}


def saves(s: Subject) -> Numbers:
    """Saved and loaded again it is the same to the bit."""
    again = s.folder / "again"
    s.model.save_pretrained(again)
    model = s.load(again)
    same_state(model.state_dict(), s.model.state_dict())
    if not torch.equal(output(model, **s.inputs), output(s.model, **s.inputs)):
        raise AssertionError("outputs differ after saving and loading")
    return {}


CHECKS: dict[str, Callable[[Subject], Numbers]] = {
    function.__name__: function
    for function in (
        loads, keeps_bytes, loads_the_same, has_every_head, equals_softmax, padding_changes_nothing, far_part_counts,
        learns, saves,
    )
}  # fmt: skip


if __name__ == "__main__":
    serve(check, SECONDS)
