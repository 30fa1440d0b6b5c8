"""`dijiang convert`: a softmax model in, a checkpoint with DiJiang attention out.

Conversion moves bytes and loads no model: base weights are copied as they are, one small shard of kernel parameters is
added, and the code that runs them. It takes as long as reading the weights once, to see that all are numbers, and
copying the folder.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from transformers import GenerationMixin, PreTrainedTokenizerBase

from .architecture.examine import Architecture, check_kernel, examine
from .architecture.layers import staying_softmax
from .checkpoint.card import write_card
from .checkpoint.companions import check_links, copy_companions, write_code
from .checkpoint.config import config_content
from .checkpoint.loading import check_generation_config, check_weights, silence
from .checkpoint.shards import (
    check_finite,
    check_size,
    digest,
    drop_tensors,
    wrapper_prefix,
    write_json,
    write_shards,
)
from .checkpoint.tokenizers import settle_tokenizer, source_tokenizer
from .errors import DijiangError, Unsupported
from .files import (
    check_beside,
    check_out,
    check_pointers,
    default_out,
    new_folder,
    paths_of,
    remove_leftovers,
    weight_files,
)
from .progress import bytes_bar, say
from .recipe import Recipe, load_recipe
from .source.resolve import Source, check_space, download, read_config, resolve

if TYPE_CHECKING:
    from .measure.calibrate import Calibration

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ConvertResult:
    """What `convert` did, or with ``dry_run`` would do. ``seconds`` is wall-clock time.

    linked: "reflink" or "hard link", where the source's weights were linked and not copied. calibration: what was
    measured, see `Calibration`. calibration_tokens: in a dry run, about how many tokens that would be measured on.
    pushed: the repository's address, set by the command line's ``--push``.
    """

    out: str
    source: str
    source_revision: str | None
    recipe: str
    layers_converted: int
    new_parameters: int
    total_parameters: int
    seconds: float
    dry_run: bool = False
    pushed: str | None = None
    linked: str | None = None
    calibration: "Calibration | None" = None
    calibration_tokens: int = 0


class Swap(TypedDict, total=False):
    """What replaces the attention, and where: keyword arguments of `convert`, which explains them."""

    recipe: str | None
    settings: Sequence[str]
    layers: str
    calibrate: bool
    data: str | Sequence[str] | None


def convert(
    source: str,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    link: bool = False,
    force: bool = False,
    dry_run: bool = False,
    **swap: Unpack[Swap],
) -> ConvertResult:
    """Swaps the attention of a pretrained decoder or encoder for a DiJiang kernel.

    Args:
        source: an alias (pythia-410m), a Hub id, or a folder.
        out: the new checkpoint's folder, by default ./NAME-dijiang.
        revision: branch, tag or commit of a Hub source.
        dtype: rewrites the weights as float32, float16 or bfloat16; by default they are copied byte for byte.
        link: take no space for the source's weights: their files become reflinks where the file system has them, else
            hard links, which are the source's own files: nothing here ever writes into one.
        force: replace ``out`` if it exists.
        dry_run: check everything that can be without downloading weights, and write nothing.
        recipe: a recipe's name or YAML file; its stages are recorded for `finetune`. By default ``default``, or
            ``encoder`` for a model that sees both sides of a token.
        settings: ``key=value`` for the recipe's kernel, as ``window=16``.
        layers: which layers: all, none, sliding-only, 0,3,8-23, every:N, not-every:N or not-last:N, or several with
            commas. The rest keep softmax. Or auto:N: calibrates, and all but the N where conversion costs most.
        calibrate: measure what each head loses, and share the memory out by it. That runs the model forwards and
            backwards on some 4,000 tokens, for which it must fit into memory: see `calibrate`.
        data: text to calibrate on, as `finetune` takes it; the recipe's own if None.

    Raises:
        DijiangError: with one line that says what is wrong and what to do. Nothing half-written is left behind.
    """
    start = time.perf_counter()
    silence()
    if dtype is not None and dtype not in DTYPES:
        raise DijiangError(f"no dtype {dtype!r}: give one of {', '.join(DTYPES)}")
    if link and dtype is not None:
        raise DijiangError("--link keeps the source's files and --dtype rewrites them: leave one of them out")
    found = resolve(source, revision)
    config = read_config(found)
    plan = _plan(config, **swap)
    architecture, softmax = plan.architecture, plan.softmax
    target = Path(out).expanduser() if out is not None else default_out(found.name)
    if not dry_run:
        remove_leftovers(target)
    check_beside(target, source)
    check_out(target, force, [source, *paths_of(swap.get("data"))])
    parameters = architecture.new_parameters(plan.recipe.kernel)  # each layer has as many
    parameters = parameters * (len(architecture.layers.layers) - softmax) // max(len(architecture.layers.layers), 1)
    result = ConvertResult(
        out=str(target),
        source=str(found),
        source_revision=found.revision,
        recipe=plan.recipe.name,
        layers_converted=len(architecture.layers.layers) - softmax,
        new_parameters=parameters,
        total_parameters=architecture.parameters + parameters,
        seconds=0.0,
        dry_run=dry_run,
        calibration_tokens=_calibration_tokens(plan) if dry_run else 0,
    )
    linked, calibration = None, None
    if not dry_run:
        found = download(found, target, linked=link)
        weights = _checked_weights(found, architecture, link)
        check_space({target: 0 if link else weights.size})
        with new_folder(target, force) as folder:
            content = config_content(config, architecture, plan.recipe, found, dtype)
            linked = _write(folder, found, weights, plan, content, DTYPES.get(dtype or ""), link)
            if plan.corpus is not None:
                calibration = _calibrate(folder, plan, config, content)
            write_card(folder)
    return dataclasses.replace(result, seconds=time.perf_counter() - start, linked=linked, calibration=calibration)


@dataclass(frozen=True)
class _Plan:
    """What a conversion does to a model.

    architecture: its layers are those that get a kernel before a calibration, softmax of which get it back after that.
    corpus: the text to calibrate on, None where nothing is measured.
    """

    recipe: Recipe
    architecture: Architecture
    softmax: int = 0
    corpus: Sequence[str] | None = None


def _plan(
    config: dict[str, Any],
    *,
    recipe: str | None = None,
    settings: Sequence[str] = (),
    layers: str = "all",
    calibrate: bool = False,
    data: str | Sequence[str] | None = None,
) -> _Plan:
    """What `Swap` says, checked against the model of this config.json. Raises DijiangError."""
    softmax = staying_softmax(layers)
    architecture = examine(config, "all" if softmax else layers)
    chosen = load_recipe(recipe or architecture.recipe, settings)
    check_kernel(chosen.kernel, architecture)
    if calibrate or softmax:
        _check_calibration(chosen, architecture, softmax)
        from .data.rows import check_data  # these need more libraries than the rest
        from .training.gather import corpus_of

        corpus = corpus_of(None, data, chosen)
        check_data(corpus)
        return _Plan(chosen, architecture, softmax, corpus)
    if data is not None:
        raise DijiangError("--data is the text to calibrate on: add --calibrate, or --layers auto:N")
    return _Plan(chosen, architecture)


def _calibration_tokens(plan: _Plan) -> int:
    if plan.corpus is None:
        return 0
    from .measure.calibrate import TOKENS

    return TOKENS


def _check_calibration(recipe: Recipe, architecture: Architecture, softmax: int) -> None:
    """Raises DijiangError where there is nothing that a calibration could choose."""
    layers = architecture.layers
    if not layers.layers:
        raise DijiangError("there is no layer to convert, so none to calibrate: leave --calibrate out")
    if not (layers.causal and issubclass(architecture.model_class, GenerationMixin)):
        raise DijiangError("calibration needs a model that predicts the next token: leave --calibrate and auto:N out")
    if not softmax and not recipe.kernel.memory:
        raise DijiangError(f"recipe {recipe.name} has no memory to share: leave --calibrate out")
    if not softmax and recipe.kernel.decay == "retnet":
        raise DijiangError(
            "a decay fixed a query head (decay=retnet) gives all heads one memory: leave --calibrate out"
        )
    if softmax >= len(layers.layers):
        count = len(layers.layers)
        raise DijiangError(f"--layers auto:{softmax} leaves none of {count} layers to convert: give a smaller N")
    if softmax and layers.borrowing:
        raise Unsupported("auto:N chooses layers one by one, and some here share keys and values: name them yourself")


@dataclass(frozen=True)
class _Weights:
    """A source's weights and tokenizer, found to be whole and readable.

    size: in bytes, of all shards. wrapper: what stands before all tensors' names and is left out. tokenizer: None for
    a model that doesn't read tokens.
    """

    shards: list[Path]
    size: int
    wrapper: str
    tokenizer: PreTrainedTokenizerBase | None


def _checked_weights(found: Source, architecture: Architecture, link: bool) -> _Weights:
    """What a downloaded source has. Raises DijiangError where it can't be copied, before anything is written."""
    assert found.folder is not None
    check_pointers(found.folder)
    reads_tokens = architecture.model_class.main_input_name == "input_ids"
    tokenizer = source_tokenizer(found.folder) if reads_tokens else None
    check_generation_config(found.folder)
    check_links(found.folder)
    shards = weight_files(found.folder)
    size = sum(shard.stat().st_size for shard in shards)
    with bytes_bar("checking", size) as advance:
        for shard in shards:
            check_finite(shard, advance)
    check_size(shards, architecture.parameters, found)
    wrapper = wrapper_prefix(shards)
    if link and shards[0].suffix != ".safetensors":
        raise DijiangError(f"--link keeps the source's files, and {shards[0].name} must be rewritten: leave it out")
    if link and wrapper:
        raise DijiangError(f"--link keeps the source's files, whose tensors are named {wrapper}…: leave it out")
    if wrapper:
        say(f"tensors are written without {wrapper} before their names, as transformers names them")
    return _Weights(shards, size, wrapper, tokenizer)


def _write(
    folder: Path,
    found: Source,
    weights: _Weights,
    plan: _Plan,
    content: dict[str, Any],
    dtype: torch.dtype | None,
    link: bool,
) -> str | None:
    """Writes a checkpoint, but for its card. ``content``, its config.json, gets the hash of the base weights. Returns
    how they were linked, or None."""
    assert found.folder is not None
    architecture = plan.architecture
    copy_companions(found.folder, folder)
    write_code(folder)
    write_json(folder / "config.json", content)
    if weights.tokenizer is not None:
        known = getattr(architecture.config.get_text_config(), "vocab_size", None) or 0
        settle_tokenizer(folder, weights.tokenizer, found, known)
    new = architecture.new_tensors(plan.recipe.kernel)
    with bytes_bar("converting", weights.size) as advance:
        linked = write_shards(folder, weights.shards, new, dtype, advance, link, weights.wrapper)
    check_weights(folder, found)
    content["dijiang"]["base_weights"] = digest(folder)
    write_json(folder / "config.json", content)
    return linked


def _calibrate(folder: Path, plan: _Plan, config: dict[str, Any], content: dict[str, Any]) -> "Calibration":
    """Measures the checkpoint in ``folder``, of which all layers were converted, and makes of it what that chooses:
    layers that stay softmax lose their kernels, and config.json tells each head's memory."""
    from .measure.calibrate import calibrate  # it needs more libraries than the rest

    assert plan.corpus is not None
    kernel, architecture = plan.recipe.kernel, plan.architecture
    calibration = calibrate(folder, plan.corpus, plan.softmax)
    if calibration.softmax:
        before = architecture.new_tensors(kernel).keys()
        rest = [str(layer) for layer in architecture.layers.layers if layer not in calibration.softmax]
        architecture = examine(config, ",".join(rest))
        drop_tensors(folder, before - architecture.new_tensors(kernel).keys())
    layers = dataclasses.replace(architecture.layers, memory=calibration.memory)
    content["dijiang"] |= {**dataclasses.asdict(layers), "calibration": dataclasses.asdict(calibration)}
    write_json(folder / "config.json", content)
    return calibration
