"""finetune: what trains, what stays, resuming, and that it really brings the model closer to the original."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from dijiang_convert import DijiangError, convert, evaluate, finetune
from dijiang_convert.checkpoint.loading import load_any, load_converted, load_tokenizer
from dijiang_convert.checkpoint.shards import INDEX, read_shard
from dijiang_convert.data.demo_text import documents
from dijiang_convert.demo import MODEL
from dijiang_convert.files import weight_files
from dijiang_convert.push import push
from dijiang_convert.training import schedule, trainer
from tests.hub import Hub
from tests.sources_on_disk import TOKENS, VOCABULARY, write_source

SEQ_LEN = 128
SHORT = {"seq_len": SEQ_LEN, "tokens": 6000}


@pytest.fixture(autouse=True, scope="module")
def few_steps() -> Iterator[None]:
    """Batches of several rows even in these short runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "LEAST_STEPS", 8)
        patch.setattr(schedule, "MICRO_BATCH_TOKENS", 2 * SEQ_LEN)  # so that batches are accumulated
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text")
    for i, document in enumerate(documents("train")[:12]):
        (folder / f"{i}.txt").write_text(document, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "demo"
    convert(str(MODEL), out, recipe="frequency", settings=["window=8", "block=8", "memory=8"])
    return out


@pytest.fixture(scope="module")
def tuned(converted: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "demo"
    result = finetune(converted, out, data=text, **SHORT)
    assert [stage.name for stage in result.stages] == ["transfer", "distill"]
    assert sum(stage.tokens for stage in result.stages) == pytest.approx(6000, rel=0.2)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {t.name: t.load() for path in weight_files(folder) for t in read_shard(path)}


def test_what_did_not_change_stays_in_files_of_its_own(converted: Path, tuned: Path, hub: Hub) -> None:
    """So that the next result of the same source uploads what LoRA changed, and no more."""
    before, after = tensors(converted), tensors(tuned)
    assert before.keys() == after.keys()  # also the source's own names
    stayed = {name for name in before if torch.equal(before[name], after[name])}
    files = {path.name: {t.name for t in read_shard(path)} for path in weight_files(tuned)}
    assert stayed and len(files) == 3
    assert [names <= stayed for names in files.values()] == [True, False, False]
    assert all(names <= stayed or not names & stayed for names in files.values())
    assert json.loads((tuned / INDEX).read_text())["weight_map"] == {
        name: file for file, names in files.items() for name in names
    }

    size = {path.name: path.stat().st_size for path in weight_files(tuned)}
    push(tuned, "finetune/pushed")
    other = weight_files(tuned)[1]
    data = bytearray(other.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    sent = hub.bytes_received
    push(tuned, "finetune/another")
    small = sum(path.stat().st_size for path in tuned.iterdir() if path.is_file() and path.suffix != ".safetensors")
    assert size[other.name] <= hub.bytes_received - sent < size[other.name] + small + 1_000_000
    data[-1] ^= 1
    other.write_bytes(data)


def test_names_without_prefix_and_weights_held_twice_survive_training(text: str, tmp_path: Path) -> None:
    """As GPT-2 is on the Hub, and as some hold their tied embedding."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=256, **TOKENS)
    weights = write_source(tmp_path / "source", config) / "model.safetensors"
    state = {name.removeprefix("transformer."): t for name, t in load_file(weights).items()}
    save_file({**state, "lm_head.weight": state["wte.weight"].clone()}, weights, {"format": "pt"})
    convert(str(tmp_path / "source"), tmp_path / "converted")
    finetune(tmp_path / "converted", tmp_path / "out", data=text, tokens=600, seq_len=64, train="full", report=False)
    before, after = tensors(tmp_path / "converted"), tensors(tmp_path / "out")
    assert before.keys() == after.keys() > {"wte.weight", "lm_head.weight", "h.0.ln_1.weight"}
    assert torch.equal(after["wte.weight"], after["lm_head.weight"])
    loaded = load_converted(tmp_path / "out").state_dict()
    assert torch.equal(loaded["transformer.wte.weight"], after["wte.weight"])
    assert torch.equal(loaded["transformer.h.0.ln_1.weight"], after["h.0.ln_1.weight"])
    assert not torch.equal(after["wte.weight"], before["wte.weight"])


def test_nothing_to_train_is_told_first(tmp_path: Path) -> None:
    convert(str(MODEL), tmp_path / "none", layers="none")
    with pytest.raises(DijiangError, match="no layer of .*none was converted"):
        finetune(tmp_path / "none", data=["text"])
    assert [path.name for path in tmp_path.iterdir()] == ["none"]


def test_every_loss_is_recorded_and_falls(converted: Path, text: str, tmp_path: Path) -> None:
    result = finetune(
        converted,
        tmp_path / "out",
        data=text,
        seq_len=SEQ_LEN,
        tokens=20_000,
        stages=["transfer"],
        settings=["batch_tokens=512"],
    )
    (stage,) = result.stages
    assert stage.losses[0][1] == stage.first_loss
    assert stage.losses[-1][1] == stage.last_loss
    assert stage.last_loss < 0.9 * stage.first_loss
    assert stage.tokens_per_second > 0
    assert stage.peak_memory_bytes > 0


def test_transfer_trains_the_kernel_alone(converted: Path, text: str, tmp_path: Path) -> None:
    finetune(converted, tmp_path / "out", data=text, stages=["transfer"], **SHORT)
    before, after = tensors(converted), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".dijiang." in name for name in changed)


def test_lora_changes_kernels_and_attention_projections(converted: Path, tuned: Path) -> None:
    before, after = tensors(converted), tensors(tuned)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    projections = {name for name in changed if ".dijiang." not in name}
    assert projections
    assert all(".attention." in name and name.endswith(".weight") for name in projections)


def test_lora_on_all_linear_layers_and_a_share_of_cross_entropy(converted: Path, text: str, tmp_path: Path) -> None:
    losses = {}
    for weight in (0.0, 1.0):
        settings = ["lora_targets=all", f"cross_entropy_weight={weight}"]
        out = tmp_path / str(weight)
        result = finetune(converted, out, data=text, stages=["distill"], settings=settings, **SHORT)
        losses[weight] = result.stages[0].first_loss
    before, after = tensors(converted), tensors(tmp_path / "0.0")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".mlp." in name for name in changed)
    assert not any("embed" in name for name in changed)
    assert losses[1.0] > 2 * losses[0.0]  # next-token loss, not divergence from the original


def test_full_changes_everything(converted: Path, text: str, tmp_path: Path) -> None:
    finetune(converted, tmp_path / "out", data=text, train="full", stages=["distill"], **SHORT)
    before, after = tensors(converted), tensors(tmp_path / "out")
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in same if ".dijiang." not in name]


def test_it_brings_the_model_closer_to_the_original(converted: Path, text: str, tmp_path: Path) -> None:
    finetune(converted, tmp_path / "out", data=text, seq_len=SEQ_LEN, tokens=30_000, settings=["batch_tokens=512"])
    held_out = documents("validation")
    figures = {"baseline": str(MODEL), "data": held_out, "seq_len": SEQ_LEN, "max_tokens": 8000}
    before, after = evaluate(converted, **figures), evaluate(tmp_path / "out", **figures)
    assert after.kl_divergence < 0.97 * before.kl_divergence
    assert after.top1_agreement > before.top1_agreement
    assert after.perplexity < before.perplexity


def test_checkpoint_tells_its_history_and_keeps_its_files(converted: Path, tuned: Path) -> None:
    section = json.loads((tuned / "config.json").read_text())["dijiang"]
    assert [step["stage"] for step in section["history"]] == ["transfer", "distill"]
    assert [step["train"] for step in section["history"]] == ["kernel", "lora"]
    names = {path.name for path in converted.iterdir() if path.suffix in (".py", ".json", ".md")}
    assert names - {"model.safetensors.index.json"} <= {path.name for path in tuned.iterdir()}
    assert not list(tuned.parent.glob("*.run"))
    assert len({path.stat().st_mode for path in tuned.iterdir() if path.is_file()}) == 1  # whoever reads one reads all


def test_losses_go_to_tensorboard(tuned: Path) -> None:
    pytest.importorskip("tensorboard")
    assert {path.parents[1].name for path in tuned.glob("runs/*/*/events.*")} == {"transfer", "distill"}


def test_the_merged_model_is_what_was_trained(tuned: Path) -> None:
    """No adapter is left in the file, and loading it again gives the same logits twice."""
    assert not [name for name in tensors(tuned) if "lora" in name or "modules_to_save" in name]
    ids = torch.randint(0, 1000, (1, 200))
    with torch.no_grad():
        one, two = (load_converted(tuned).eval()(ids).logits for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("stopped_in", ["transfer", "distill"])
def test_resumed_run_ends_where_an_unbroken_one_does(
    converted: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str, stopped_in: str
) -> None:
    options = {**SHORT, "train": train, "tokens": 4000}
    finetune(converted, tmp_path / "unbroken", data=text, **options)

    class Stop(trainer._ProgressCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if self.stage.name == stopped_in and state.global_step == self.steps - 2:
                raise KeyboardInterrupt
            super().on_step_end(args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_ProgressCallback", Stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(converted, tmp_path / "broken", data=text, **options)
    assert not (tmp_path / "broken").exists()
    finetune(converted, tmp_path / "broken", data=text, resume=True, **options)
    unbroken, resumed = tensors(tmp_path / "unbroken"), tensors(tmp_path / "broken")
    for name, tensor in unbroken.items():
        assert torch.equal(resumed[name], tensor), name


def test_the_same_seed_gives_the_same_weights(converted: Path, text: str, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        torch.rand(3)  # whatever happened before
        finetune(converted, tmp_path / name, data=text, stages=["distill"], seed=seed, seq_len=SEQ_LEN, tokens=1000)
    one, two, other = (tensors(tmp_path / name) for name in ("one", "two", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_nothing_to_resume(converted: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(DijiangError, match="nothing to resume"):
        finetune(converted, tmp_path / "out", data=text, resume=True, **SHORT)


def test_a_trained_checkpoint_needs_its_original_again(tuned: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(DijiangError, match="--teacher"):
        finetune(tuned, tmp_path / "out", data=text, stages=["distill"], **SHORT)
    result = finetune(tuned, tmp_path / "out", data=text, stages=["distill"], teacher=str(MODEL), **SHORT)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["dijiang"]
    assert [step["stage"] for step in section["history"]] == ["transfer", "distill", "distill"]
    assert result.stages[0].first_loss > 0


def test_base_weights_that_something_else_trained_are_not_the_original(
    converted: Path, text: str, tmp_path: Path
) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(converted, folder)
    path = next(path for path in weight_files(folder) if any(".dijiang." not in t.name for t in read_shard(path)))
    state = load_file(path)
    name = next(name for name in state if name.endswith("dense.weight"))
    state[name] += 1e-3
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(DijiangError, match="were trained or changed") as call:
        finetune(folder, tmp_path / "out", data=text, stages=["distill"], **SHORT)
    assert "--teacher (it was demo_model)" in str(call.value)
    finetune(folder, tmp_path / "out", data=text, stages=["transfer"], **SHORT)  # its own attention, whatever that is
    with pytest.raises(DijiangError, match="were trained or changed"):
        finetune(tmp_path / "out", tmp_path / "again", data=text, stages=["distill"], **SHORT)
    finetune(folder, tmp_path / "told", data=text, stages=["distill"], teacher=str(MODEL), **SHORT)

    finetune(converted, tmp_path / "half", data=text, stages=["transfer"], **SHORT)
    finetune(tmp_path / "half", tmp_path / "whole", data=text, stages=["distill"], **SHORT)  # kernels alone changed


def test_without_a_checkpoint_it_takes_the_only_one_here(
    converted: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DijiangError, match="no converted checkpoints"):
        finetune(data=text, **SHORT)
    convert(str(MODEL), "one", recipe="frequency", settings=["window=8", "block=8", "memory=8"])
    finetune(data=text, stages=["transfer"], **SHORT)
    assert "finetuning one" in capsys.readouterr().err
    assert (tmp_path / "one-finetuned" / "config.json").is_file()
    convert(str(MODEL), "two")
    with pytest.raises(DijiangError, match=r"2 converted checkpoints.*one, two"):
        finetune(data=text, **SHORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ["distil"]}, "no stage 'distil': valid are transfer, distill"),
        ({"settings": ["learning_rte=1"]}, "did you mean learning_rate"),
        ({"settings": ["distil.tokens=5"]}, "did you mean distill"),
        ({"data": "/no/such/folder"}, "no such file"),
        ({"data": ["a few words"]}, "less than one row"),
        ({"seq_len": 10_000_000}, "beyond the original's context of 2048"),
    ],
)
def test_bad_input_is_one_line(
    converted: Path, text: str, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(DijiangError, match=message) as error:
        finetune(converted, tmp_path / "out", **{"data": text, **SHORT, **options})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_paper_and_window_only_train(text: str, tmp_path: Path) -> None:
    for recipe in ("paper", "window-only", "pure"):
        convert(str(MODEL), tmp_path / recipe, recipe=recipe)
        result = finetune(tmp_path / recipe, data=text, seq_len=SEQ_LEN, tokens=4000)
        assert all(math.isfinite(stage.last_loss) for stage in result.stages)
        model = load_converted(result.out)
        assert tensors(Path(result.out)) if recipe == "window-only" else model


@pytest.mark.parametrize("train", ["lora", "full"])
def test_half_precision_weights_stay_so_and_kernels_float32(text: str, tmp_path: Path, train: str) -> None:
    convert(
        str(MODEL),
        tmp_path / "half",
        recipe="frequency",
        dtype="bfloat16",
        settings=["window=8", "block=8", "memory=8"],
    )
    finetune(tmp_path / "half", tmp_path / "out", data=text, seq_len=SEQ_LEN, tokens=2000, train=train)
    before, after = tensors(tmp_path / "half"), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".dijiang." not in name for name in changed)
    for name, tensor in after.items():
        assert tensor.dtype == (torch.float32 if ".dijiang." in name else torch.bfloat16), name


def test_evaluate_agrees_with_a_plain_computation() -> None:
    data = documents("validation")[:2]
    result = evaluate(str(MODEL), baseline=str(MODEL), data=data, seq_len=200, max_tokens=1500)
    model, tokenizer = load_any(str(MODEL)).eval(), load_tokenizer(str(MODEL))
    loss, count = 0.0, 0
    end = tokenizer.eos_token_id
    ids = tokenizer(data[0])["input_ids"] + [end]
    rows = [ids[i : i + 200] for i in range(0, len(ids), 200)][:8]
    assert len(rows) == 8  # the first document alone fills them
    with torch.no_grad():
        for row in rows:
            log_p = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
            loss -= float(log_p.gather(-1, torch.tensor(row[1:])[:, None]).sum())
            count += len(row) - 1
    assert result.perplexity == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert result.perplexity_ratio == pytest.approx(1, abs=1e-6)
    assert result.kl_divergence == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1


def test_the_checkpoint_may_be_the_current_folder(
    converted: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(converted, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    result = finetune(".", data=str(Path(text).resolve()), dry_run=True, **SHORT)
    assert result.out == str(tmp_path / "here-finetuned")
