"""Calibration: what each layer loses is measured as it would be by converting it alone or not, and memory and softmax
layers follow it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from typer.testing import CliRunner

from dijiang_convert.checkpoint.loading import load_converted
from dijiang_convert.cli import app
from dijiang_convert.convert import convert
from dijiang_convert.data.demo_text import documents
from dijiang_convert.demo import MODEL
from dijiang_convert.errors import DijiangError
from dijiang_convert.generate import generate
from dijiang_convert.inspect import state_bytes
from dijiang_convert.measure.calibrate import (
    _SHARES,
    NAME,
    POINTS,
    _mixed,
    _texts,
    calibrate,
    shared_memory,
    small_tables,
)
from dijiang_convert.measure.timing import cache_bytes
from dijiang_convert.modeling.configuration_dijiang import read_section
from dijiang_convert.modeling.interface import dijiang_attention, dijiang_mask, softmax_attention
from dijiang_convert.training.attention import attention, original
from tests.models import checkpoint, load
from tests.sources_on_disk import VOCABULARY, edit_config, write_source
from tests.test_encoders import write_bert

SMALL = ("window=32", "block=16", "memory=32")
STATE = (*SMALL, "decay_rank=0")  # which makes all kernels start alike, not at random
RETNET = ("--recipe", "frequency", "--set", "decay=retnet", "--set", "selective=false", "--set", "decay_rank=0")
CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def text() -> list[str]:
    return documents("train")


def test_memory_is_shared_by_what_it_is_worth() -> None:
    """Twice as much for the head that is worth most a row, as long as there are rows."""
    assert shared_memory([[0.4, 0.2], [0.1, 0.1]], 64) == ((128, 64), (32, 32))
    assert shared_memory([[0.4], [0.2], [0.1], [1e-16]], 64) == ((128,), (64,), (32,), (32,))
    assert shared_memory([[0.4, 0.1, 0.1], [0.0, 0.0, 0.0]], 64) == ((128, 64, 64), (32, 32, 32))


def test_a_head_worth_nothing_spoils_no_share() -> None:
    assert shared_memory([[0.4, 0.0], [-0.1, 0.0]], 64) == ((128, 32), (32, 32))
    assert shared_memory([[-0.1], [0.0]], 63) == ((63,), (63,))


def test_no_head_gets_too_little_or_too_much() -> None:
    worth = [[1.0, 0.05, 0.02, -0.3, 0.0], [0.01, 0.01, 0.003, 0.0, 0.0], *([0.0] * 5 for _ in range(4))]
    memory = shared_memory(worth, 64)
    flat = [rows for heads in memory for rows in heads]
    assert memory[0] == (8 * 64, 256, 128, 32, 32) and memory[1] == (128, 64, 64, 32, 32)
    assert min(flat) == 32 and sum(flat) <= 30 * 64


# Without a state all that jumps as a head gets a little more softmax, the choice of keys, shows more: so no memory.
CASES = [("default", ("window=32", "block=16", "memory=0")), ("frequency", STATE)]


@pytest.mark.parametrize(("recipe", "settings"), CASES, ids=["no-memory", "state"])
def test_worth_is_what_giving_heads_back_gains(
    recipe: str, settings: tuple[str, ...], tmp_path: Path, text: list[str]
) -> None:
    """The derivative, against the divergence of models that have a little more softmax in one head; and heads together
    make up for about all that is lost."""
    convert(str(MODEL), tmp_path / "all", recipe=recipe, settings=settings)
    found = calibrate(tmp_path / "all", text, tokens=2048)
    assert sum(sum(heads) for heads in found.worth.values()) == pytest.approx(1, abs=0.25)
    model: Any = load_converted(tmp_path / "all", device=CPU).eval()
    layers = [module for module in model.modules() if hasattr(module, "dijiang")]
    with small_tables(layers) as held:
        (batch,) = _texts(text, tmp_path / "all", model, held, 2048)
        passage = batch["input_ids"].shape[1] // 8
        begin = _begin(batch["input_ids"][0], passage)
        assert begin < batch["input_ids"].shape[1] - held - 2 * passage
        rate = {}
        for share, _ in POINTS:
            losses = [_lost(model, layers, batch, passage, share, move) for move in (-1e-2, 1e-2)]
            rate[share] = (losses[0] - losses[1]) / 2e-2
    expected = sum(weight * rate[share] for share, weight in POINTS)
    assert found.worth[2][1] == pytest.approx(float(expected), rel=0.02, abs=1e-4)


def _begin(ids: torch.Tensor, passage: int) -> int:
    """Where the passage at the end of a text came before."""
    found = (ids.unfold(0, passage, 1) == ids[-passage:]).all(1).nonzero()[:, 0]
    assert len(found) == 2
    return int(found[0])


def _lost(model: Any, layers: list[Any], batch: Any, passage: int, share: float, move: float) -> torch.Tensor:
    """Half the sum of KL on a text and on its end, by what they are without softmax, where one head has a little more
    or less of it than the others: from the definition, with logits as a whole."""
    ids, kl = batch["input_ids"], {}
    with torch.no_grad(), original(model):
        expected = model(ids).logits[0, :-1].double().log_softmax(-1)
    shares = torch.full((len(layers), model.config.dijiang["kv_heads"]), share, requires_grad=True)
    with torch.no_grad():
        shares[2, 1] += move
        for name, given in (("none", torch.zeros_like(shares)), ("some", shares)):
            token = _SHARES.set(dict(zip(layers, given, strict=True)))
            with attention(model, NAME):
                found = model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            _SHARES.reset(token)
            each = (expected.exp() * (expected - found)).sum(-1)
            kl[name] = torch.stack([each[:-passage].sum(), each[-passage:].sum()])
    return (kl["some"] / kl["none"]).mean()


def test_what_is_measured_decides(tmp_path: Path, text: list[str]) -> None:
    """The kernels of the others alone are written, and all else is as with the layers named by hand."""
    chosen: dict[str, Any] = {"recipe": "frequency", "settings": STATE}
    result = convert(str(MODEL), tmp_path / "auto", layers="auto:1", data=text, **chosen)
    found = result.calibration
    assert found is not None and result.layers_converted == 3
    best = max(found.worth, key=lambda i: sum(found.worth[i]))
    rest = [i for i in range(4) if i != best]
    assert found.softmax == (best,)
    assert found.memory == shared_memory([found.worth[i] for i in rest], 32)
    by_hand = convert(str(MODEL), tmp_path / "by hand", layers=",".join(map(str, rest)), **chosen)
    assert result.new_parameters == by_hand.new_parameters
    for out in ("auto", "by hand"):
        index = json.loads((tmp_path / out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(
            t.nbytes for path in (tmp_path / out).glob("*.safetensors") for t in load_file(path).values()
        )
    assert _tensors(tmp_path / "auto").keys() == _tensors(tmp_path / "by hand").keys()
    assert all(torch.equal(x, _tensors(tmp_path / "by hand")[name]) for name, x in _tensors(tmp_path / "auto").items())
    section = json.loads((tmp_path / "auto/config.json").read_text())["dijiang"]
    assert section["layers"] == rest and section["memory"] == [list(heads) for heads in found.memory]
    assert section["calibration"]["softmax"] == [best]
    card = (tmp_path / "auto/README.md").read_text()
    assert f"{found.kl:.3f}" in card and "1 of its layers stayed softmax" in card


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def test_short_documents_count_too(tmp_path: Path, text: list[str]) -> None:
    """As many of the longest as make up the text, each alone and by its length."""
    convert(str(MODEL), tmp_path / "out", settings=("window=16", "block=16", "memory=16"))
    pieces = [document[:400] for document in text]
    found = calibrate(tmp_path / "out", pieces, tokens=1024)
    assert 900 < found.tokens < 1300 and found.kl > 0
    longer = calibrate(tmp_path / "out", [*pieces[:2], text[0][:3000]], tokens=300)
    assert longer.tokens > 600  # of the long one


def test_layers_are_chosen_where_heads_can_share_no_memory(tmp_path: Path, text: list[str]) -> None:
    """With a decay fixed a query head."""
    options: dict[str, Any] = {"layers": "auto:1", "recipe": "frequency", "data": text}
    settings = (*STATE, "decay=retnet", "selective=false")
    found = convert(str(MODEL), tmp_path / "out", settings=settings, **options).calibration
    assert found is not None and len(found.softmax) == 1 and found.memory == ()
    assert generate(tmp_path / "out", "def f", max_new_tokens=4).text


def test_a_dry_run_counts_as_the_run_does(tmp_path: Path, text: list[str]) -> None:
    options: dict[str, Any] = {"layers": "auto:1", "recipe": "frequency", "settings": STATE, "data": text}
    told = convert(str(MODEL), tmp_path / "out", dry_run=True, **options)
    done = convert(str(MODEL), tmp_path / "out", **options)
    assert (told.new_parameters, told.total_parameters) == (done.new_parameters, done.total_parameters)
    assert told.layers_converted == done.layers_converted == 3


def test_linked_weights_stay_as_they_are(tmp_path: Path, text: list[str]) -> None:
    source = shutil.copytree(MODEL, tmp_path / "source")
    before = (source / "model.safetensors").read_bytes()
    convert(str(source), tmp_path / "out", layers="auto:1", settings=SMALL, data=text, link=True)
    assert (source / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("memory", [[[3, 3]], [3, 13], [[3, 3], [3]]], ids=str)
def test_memory_of_other_layers_or_heads_is_refused(tmp_path: Path, memory: list[Any]) -> None:
    folder = shutil.copytree(checkpoint("llama", "shared"), tmp_path / "out")
    section = json.loads((folder / "config.json").read_text())["dijiang"]
    edit_config(folder, dijiang={**section, "memory": memory})
    with pytest.raises(DijiangError, match="memory is not 2 lists, one a layer, of 2 numbers, one a key/value head"):
        load_converted(folder)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_all_layers_softmax_are_the_original(kind: str, tmp_path: Path) -> None:
    """In what calibration (and attention transfer) takes for softmax, sliding windows too."""
    window = {"sliding_window": 24}
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, **window,
    )  # fmt: skip
    folder = write_source(tmp_path / kind, config)
    convert(str(folder), tmp_path / "out", layers="sliding-only")
    model: Any = load_converted(tmp_path / "out", device=CPU).eval()
    ids = torch.randint(1, 200, (1, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), original(model):
        expected = model(ids).logits
    AttentionInterface.register("dijiang_all_softmax", _softmax)
    AttentionMaskInterface.register("dijiang_all_softmax", dijiang_mask)
    with torch.no_grad(), attention(model, "dijiang_all_softmax"):
        found = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def _softmax(module: Any, *tensors: Any, dijiang: Any = None, **kwargs: Any) -> Any:
    return softmax_attention(module, *tensors, **kwargs)


def test_calibrated_checkpoint_is_whole(tmp_path: Path, text: list[str]) -> None:
    """It loads by AutoModel, keeps its shares when saved again, and its cache has as many bytes as is said."""
    result = convert(str(MODEL), tmp_path / "out", calibrate=True, settings=SMALL, data=text)
    assert result.calibration is not None and result.calibration.softmax == ()
    memory = result.calibration.memory
    flat = [rows for heads in memory for rows in heads]
    assert len(set(flat)) > 1 and sum(flat) <= len(flat) * 32
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    for each in (model, again):
        assert tuple(m.dijiang.memory for m in each.modules() if hasattr(m, "dijiang")) == memory
    ids = torch.arange(1, 200)[None] % 100
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert cache_bytes(cache) == state_bytes(*read_section(model.config), torch.float32)
    assert generate(tmp_path / "out", "def f", max_new_tokens=4).text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layers", "auto:0"), "auto:N"),
        (("--layers", "auto:x"), "auto:N"),
        (("--layers", "auto:4"), "leaves none of 4 layers"),
        (("--layers", "none", "--calibrate"), "no layer to convert"),
        (("--layers", "auto:1", "--data", "no-such.txt", "--dry-run"), "no-such.txt"),
        (("--calibrate", "--recipe", "pure"), "no memory to share"),
        (("--calibrate", *RETNET), "gives all heads one memory"),
        (("--data", "text.txt"), "add --calibrate"),
        (("--calibrate", "--data", "no-such.txt"), "no-such.txt"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    answer = CliRunner().invoke(app, ["convert", str(MODEL), "--out", str(tmp_path / "out"), *options])
    assert answer.exit_code == 1 and not (tmp_path / "out").exists()
    assert answer.stderr.startswith("error: ") and said in answer.stderr and answer.stderr.count("\n") == 1


def test_rows_that_the_table_holds_measure_nothing(tmp_path: Path, text: list[str]) -> None:
    short = shutil.copytree(MODEL, tmp_path / "short")
    edit_config(short, max_position_embeddings=64)
    with pytest.raises(DijiangError, match="texts of at most 64 tokens are too short"):
        convert(str(short), tmp_path / "out", calibrate=True, data=text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part,said", [(0.0, "no head loses anything"), (1e37, "not finite")], ids=str)
def test_a_model_that_loses_nothing_or_is_broken(tmp_path: Path, text: list[str], part: float, said: str) -> None:
    """Where attention adds nothing to the residual stream, and where it adds more than a number can hold."""
    source = shutil.copytree(MODEL, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    changed = {name: x * part if ".attention.dense." in name else x for name, x in tensors.items()}
    save_file(changed, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(DijiangError, match=said):
        convert(str(source), tmp_path / "out", calibrate=True, settings=SMALL, data=text)
    assert not (tmp_path / "out").exists()


def test_a_share_of_a_key_value_head_is_of_its_query_heads() -> None:
    """Of four query heads two belong to each."""
    model: Any = load("llama")
    (module, *_) = [m for m in model.modules() if hasattr(m, "dijiang")]
    found: dict[str, torch.Tensor] = {}

    def compare(own: Any, *tensors: Any, **kwargs: Any) -> Any:
        if own is module:
            for name, share in (("none", (0.0, 0.0)), ("first", (1.0, 0.0)), ("all", (1.0, 1.0))):
                found[name], _ = _mixed(torch.tensor(share), own, *tensors, **kwargs)
            rest = {name: value for name, value in kwargs.items() if name != "dijiang"}
            found["softmax"], _ = softmax_attention(own, *tensors, **rest)
        return dijiang_attention(own, *tensors, **kwargs)

    AttentionInterface.register("dijiang_compare_shares", compare)
    AttentionMaskInterface.register("dijiang_compare_shares", dijiang_mask)
    with torch.no_grad(), attention(model, "dijiang_compare_shares"):
        model(torch.randint(1, 200, (1, 150)), use_cache=False)
    torch.testing.assert_close(found["all"], found["softmax"])
    torch.testing.assert_close(found["first"][:, :, :2], found["softmax"][:, :, :2])
    torch.testing.assert_close(found["first"][:, :, 2:], found["none"][:, :, 2:])
    assert (found["none"] - found["softmax"]).abs().max() > 1e-2


def test_an_encoder_is_refused(tmp_path: Path) -> None:

    folder = write_bert(tmp_path / "bert")
    with pytest.raises(DijiangError, match="predicts the next token"):
        convert(str(folder), tmp_path / "out", calibrate=True)


def test_the_command_shows_what_it_measured(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(documents("train")[:40]))
    arguments = [
        "convert",
        str(MODEL),
        "--out",
        str(tmp_path / "out"),
        "--calibrate",
        "--data",
        str(tmp_path / "text.txt"),
    ]
    answer = CliRunner().invoke(app, [*arguments, *(part for key in SMALL for part in ("--set", key))])
    assert answer.exit_code == 0, answer.stderr
    assert "rows of memory" in answer.stdout and "KL" in answer.stdout
    answer = CliRunner().invoke(app, [*arguments, "--force", "--json", "--layers", "auto:2"])
    assert len(json.loads(answer.stdout)["calibration"]["softmax"]) == 2
