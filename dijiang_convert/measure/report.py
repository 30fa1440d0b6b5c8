"""Writes what a run leaves beside the weights: plots, and one HTML file with the plots and all that was recorded.

Everything comes from the files of the result folder and from the probes; nothing is measured here. No local path is
written.
"""

import base64
import dataclasses
import html
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml

from .. import __version__
from ..checkpoint.shards import read_checkpoint
from ..files import new_file
from ..training.log import read_log
from .likeness import Likeness
from .probe import Probe

LOG = "training.jsonl"
REPORT = "report.html"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")
MODELS = {"original": "s--", "before": "^-", "after": "o-"}  # the models, and matplotlib's format of their lines
# Columns of the table of the checkpoint's history.
STAGE = ("stage", "objective", "train", "tokens", "seq_len", "first_loss", "last_loss")

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; vertical-align: top; }
pre { background: #f5f5f5; padding: .75rem; overflow-x: auto; white-space: pre-wrap; margin: 0; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def write_report(
    folder: Path,
    probes: Mapping[str, Probe | Likeness],
    prompts: Sequence[str],
    recipe: Mapping[str, Any],
    facts: Mapping[str, str],
    note: str = "",
) -> None:
    """Writes plots/loss.png, plots/transfer.png, plots/perplexity.png and report.html into a finetuned checkpoint.

    A plot without data (no attention transfer, no text to measure on) is left out.

    Args:
        folder: the checkpoint, with config.json and training.jsonl.
        probes: what was measured of "original", "before" and "after".
        prompts: the prompts that the texts of the probes continue.
        recipe: kernel and stages as they ran.
        facts: more rows for the table of versions.
        note: a line on what was measured, or why it was not.
    """
    record = read_checkpoint(folder)["dijiang"]
    lines = read_log(folder / LOG)
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    measured = {name: probe for name in MODELS if isinstance(probe := probes.get(name), Probe)}
    alike = {name: probe for name in MODELS if isinstance(probe := probes.get(name), Likeness)}
    parts = [f"<p>{html.escape(_summary(record, lines))}</p>"]
    if lines:
        _draw_losses(lines, plots / "loss.png")
        parts += ["<h2>Loss</h2>", _image(plots / "loss.png", "loss of every stage against tokens")]
    if any(line.get("layer_errors") for line in lines):
        _draw_transfer(lines, record["layers"], plots / "transfer.png")
        parts += ["<h2>Attention transfer</h2>", _image(plots / "transfer.png", "error of every layer against tokens")]
    parts += ["<h2>Held-out text</h2>", *([f"<p>{html.escape(note)}</p>"] if note else [])]
    if measured:
        _draw_perplexity(measured, plots / "perplexity.png")
        rows = [(name, f"{probe.perplexity:.4g}") for name, probe in measured.items()]
        parts += [_table(("model", "perplexity"), rows), _image(plots / "perplexity.png", "perplexity by position")]
        parts += [_texts(prompt, i, measured) for i, prompt in enumerate(prompts)]
    if alike:
        header = [field.name.replace("_", " ") for field in dataclasses.fields(Likeness)]
        lines_alike = [(name, *map(_figure, dataclasses.astuple(each))) for name, each in alike.items()]
        parts += ["<p>How like the original's the output is:</p>", _table(("model", *header), lines_alike)]
    history = [tuple(_figure(step.get(key)) for key in STAGE) for step in record["history"]]
    parts += ["<h2>History of the checkpoint</h2>", _table(STAGE, history)]
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(yaml.safe_dump(dict(recipe), sort_keys=False))}</pre>"]
    parts += ["<h2>Made with</h2>", _table(("", ""), [*facts.items(), *_versions()])]
    title = html.escape(f"{Path(str(record['source'])).name} with DiJiang attention: finetune")
    with new_file(folder / REPORT) as partial:
        partial.write_text(PAGE.substitute(title=title, body="\n".join(parts)), encoding="utf-8")


def _summary(record: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    last = [list(group)[-1] for _, group in groupby(lines, key=lambda line: line["index"])]
    tokens, seconds = sum(line["tokens"] for line in last), sum(line["seconds"] for line in last)
    return f"Recipe {record['recipe']}, {len(last)} stages, {tokens:,} tokens in {seconds:,.0f} seconds of training."


def _texts(prompt: str, index: int, probes: Mapping[str, Probe]) -> str:
    rows = [("prompt", prompt), *((name, probe.texts[index]) for name, probe in probes.items())]
    cells = "".join(f"<tr><th>{name}</th><td><pre>{html.escape(text)}</pre></td></tr>" for name, text in rows)
    return f"<table>{cells}</table>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell.replace('_', ' '))}</th>" for cell in header) if any(header) else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"


def _image(path: Path, text: str) -> str:
    return f'<p><img alt="{text}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></p>'


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value or "")


def _versions() -> list[tuple[str, str]]:
    versions = [("dijiang-convert", __version__)]
    versions += [(name, importlib.metadata.version(name)) for name in LIBRARIES]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return [*versions, ("Python", platform.python_version()), ("device", device)]


# ----------------------------------------------------------------------------------------------------------- plots


def _stages(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The stages that ran, as (title, lines of the log)."""
    groups = [list(group) for _, group in groupby(lines, key=lambda line: line["index"])]
    names = [group[0]["stage"].replace("$", r"\$") for group in groups]  # matplotlib reads formulas between two $
    return [(f"{group[0]['index'] + 1}. {name}", group) for name, group in zip(names, groups, strict=True)]


def _draw_losses(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots the loss as logged and as a running mean. Each stage has a panel, since stages have different losses."""
    from matplotlib.figure import Figure

    stages = _stages(lines)
    figure = Figure(figsize=(4.5 * len(stages), 3.6), layout="constrained")
    for axes, (title, group) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        tokens, losses = [line["tokens"] for line in group], [line["loss"] for line in group]
        axes.plot(tokens, losses, color="C0", alpha=0.3, label="logged")
        axes.plot(tokens, running_mean(losses), color="C0", label="mean of 10")
        axes.set(title=title, xlabel="tokens", ylabel="loss")
        _scale(axes, losses)
        axes.legend()
    _save(figure, path)


def _draw_transfer(lines: Sequence[Mapping[str, Any]], layers: Sequence[int], path: Path) -> None:
    """Plots the error of every layer over attention transfer, as a heat map for each such stage."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    stages = [(title, [line for line in group if line.get("layer_errors")]) for title, group in _stages(lines)]
    stages = [(title, group) for title, group in stages if group]
    figure = Figure(figsize=(1 + 5.5 * len(stages), 1.8 + max(2.0, 0.16 * len(layers))), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    errors = [torch.tensor([line["layer_errors"] for line in group]).T for _, group in stages]
    low, high = min(float(e.min()) for e in errors), max(float(e.max()) for e in errors)
    scale = LogNorm(max(low, 1e-12), max(high, low * 1.01, 1.01e-12))
    for axes, (title, group), error in zip(panels, stages, errors, strict=True):
        edges = [0, *(line["tokens"] for line in group)]
        mesh = axes.pcolormesh(edges, range(len(layers) + 1), error.numpy(), norm=scale, cmap="viridis")
        step = -(-len(layers) // 16)
        axes.set_yticks([i + 0.5 for i in range(0, len(layers), step)], [str(n) for n in layers[::step]])
        axes.set(title=title, xlabel="tokens", ylabel="layer")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.colorbar(mesh, ax=panels, label="squared error over the squared norm\nof softmax attention's output")
    _save(figure, path)


def _draw_perplexity(probes: Mapping[str, Probe], path: Path) -> None:
    """Plots the perplexity by position of every probe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, probe in probes.items():
        axes.plot(*zip(*probe.by_position, strict=True), MODELS[name], label=f"{name}: {probe.perplexity:.4g} in all")
    values = [value for probe in probes.values() for _, value in probe.by_position]
    axes.set(title="held-out text", xlabel="position in the row (tokens)", ylabel="perplexity")
    _scale(axes, values)
    axes.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _scale(axes: Any, values: Sequence[float]) -> None:
    """Formats the axes: y is logarithmic if values differ by more than a factor of 3, and ticks are plain numbers."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    if max(values) > 3 * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)


def running_mean(values: Sequence[float], width: int = 10) -> list[float]:
    """The mean of the last ``width`` values at each place: losses vary more from row to row than by training."""
    return [sum(values[max(i - width + 1, 0) : i + 1]) / min(width, i + 1) for i in range(len(values))]
