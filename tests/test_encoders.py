"""Encoders through every verb: a BERT with its head, and as a sentence-transformers model. (What conversion keeps of
each type is checked by tests/sweep.)"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from dijiang_convert import DijiangError, benchmark, convert, evaluate, finetune, generate, inspect
from dijiang_convert.checkpoint.loading import load_any, load_converted, load_tokenizer
from dijiang_convert.checkpoint.shards import read_checkpoint
from dijiang_convert.data.demo_text import documents
from dijiang_convert.data.rows import token_rows
from dijiang_convert.training import schedule
from dijiang_convert.training.attention import original
from dijiang_convert.training.attention_transfer import attention_transfer_loss, transferring
from dijiang_convert.training.outputs import output_loss
from tests.models import randomise
from tests.sources_on_disk import VOCABULARY, write_tokenizer

SEQ_LEN = 128
START, END, PAD = 256, 257, 0
TEXTS = documents("train")[:6]
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


@pytest.fixture(autouse=True, scope="module")
def few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "LEAST_STEPS", 8)
        yield


def write_bert(folder: Path, head: str = "BertForMaskedLM", **changes: Any) -> Path:
    """With a tokenizer that puts texts between <s> and </s>, and the files of a sentence-transformers model."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": SEQ_LEN, "initializer_range": 0.3, **changes}
    )  # fmt: skip
    getattr(transformers, head)(config).save_pretrained(folder)
    write_tokenizer(folder, around=("<s>", "</s>"))
    (folder / "modules.json").write_text(json.dumps(MODULES))
    for module in MODULES[1:]:
        (folder / module["path"]).mkdir()
        (folder / module["path"] / "config.json").write_text("{}")
    save_file({"linear.weight": torch.ones(2, 32)}, folder / "2_Dense/model.safetensors")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("sources") / "bert")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "bert"
    assert convert(str(source), out, settings=["window=8", "block=8", "memory=8"]).layers_converted == 2
    return out


@pytest.fixture(scope="module")
def tuned(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "bert"
    result = finetune(converted, out, data=TEXTS, tokens=60_000)
    assert all(stage.last_loss < stage.first_loss for stage in result.stages)
    return out


def batch(count: int = 4) -> dict[str, Tensor]:
    """Rows of unlike lengths, all far longer than the window, padded on the right."""
    ids = torch.randint(1, START, (count, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(SEQ_LEN) < SEQ_LEN - 20 * torch.arange(count)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def model_of(folder: Path, attention: str = "dijiang") -> Any:
    return randomise(load_converted(folder, attention)).eval()


@torch.no_grad()
def hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.base_model(**inputs).last_hidden_state


# ----------------------------------------------------------------------------------------------------------- convert


def test_every_head_and_further_module_comes_along(converted: Path) -> None:
    heads = json.loads((converted / "config.json").read_text())["auto_map"]
    assert {"AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification",
            "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"} <= heads.keys()  # fmt: skip
    assert "AutoModelForCausalLM" not in heads
    assert (converted / "modules.json").is_file() and (converted / "1_Pooling/config.json").is_file()
    assert (converted / "2_Dense/model.safetensors").is_file()


def test_a_module_without_files_has_no_folder(tmp_path: Path) -> None:
    """Git and the Hub keep no empty folders."""
    folder = write_bert(tmp_path / "bert")
    normalize = {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"}
    (folder / "modules.json").write_text(json.dumps([*MODULES, normalize]))
    convert(str(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "modules.json").read_text())[3] == normalize
    (folder / "modules.json").write_text(json.dumps([*MODULES, {**normalize, "type": MODULES[1]["type"]}]))
    with pytest.raises(DijiangError, match="names 3_Normalize, no folder of"):
        convert(str(folder), tmp_path / "again")


def test_an_encoder_gets_a_recipe_of_its_own(source: Path, converted: Path, tmp_path: Path) -> None:
    section = read_checkpoint(converted)["dijiang"]
    assert section["recipe"] == "encoder" and section["kernel"]["rotary"] == "keep"
    assert section["kernel"]["window"] == 8  # as it was set
    assert convert(str(source), tmp_path / "out", recipe="default").recipe == "default"


def test_the_card_tells_how_to_load_it(source: Path, converted: Path, tmp_path: Path) -> None:
    card = (converted / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card and "library_name: sentence-transformers" in card
    assert "SentenceTransformer(checkpoint, trust_remote_code=True)" in card
    assert "grow linearly with length" in card
    plain = shutil.copytree(source, tmp_path / "plain")
    (plain / "modules.json").unlink()
    convert(str(plain), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "pipeline_tag: fill-mask" in card and "AutoModelForMaskedLM.from_pretrained" in card


def test_modules_with_code_of_their_own_or_elsewhere_are_refused(source: Path, tmp_path: Path) -> None:
    for change, expected in ({"type": "custom.Pooler"}, "custom.Pooler"), ({"path": "../other"}, "../other"):
        folder = write_bert(tmp_path / expected.strip("./"))
        (folder / "modules.json").write_text(json.dumps([MODULES[0], {**MODULES[1], **change}]))
        with pytest.raises(DijiangError, match=expected):
            convert(str(folder), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_old_checkpoints_of_bert(tmp_path: Path) -> None:
    """They have a pooler that the class for masked words does not use, positions, and old names for norms."""
    folder = write_bert(tmp_path / "bert", "BertForPreTraining")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    weights = load_file(folder / "model.safetensors")
    old = {k.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for k, v in weights.items()}
    old["bert.embeddings.position_ids"] = torch.arange(SEQ_LEN)[None]
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    convert(str(folder), tmp_path / "out", settings=["window=8", "block=8", "memory=8"])
    same = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    inputs = batch()
    found = load_converted(tmp_path / "out", "softmax").eval()(**inputs).logits
    torch.testing.assert_close(found, same(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_a_decoder_without_a_language_head_converts(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama")
    convert(str(tmp_path / "llama"), tmp_path / "out", settings=["window=8", "block=8", "memory=8"])
    result = evaluate(tmp_path / "out", baseline=str(tmp_path / "llama"), data=TEXTS, seq_len=64, max_tokens=500)
    assert result.likeness is not None and 0 < result.likeness.hidden_error < 1


def test_an_image_model_needs_no_tokenizer(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=48, patch_size=4
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    convert(str(tmp_path / "vit"), tmp_path / "out", settings=["window=8", "block=8", "memory=8"])
    model = load_converted(tmp_path / "out")
    assert model(pixel_values=torch.randn(2, 3, 48, 48)).logits.shape == (2, 2)


# ---------------------------------------------------------------------------------------------------- what they give


def test_an_encoder_has_no_cache(converted: Path) -> None:
    with pytest.raises(ValueError, match="sees both sides"):
        load_converted(converted).base_model(**batch(), past_key_values=DynamicCache())


def test_positions_that_restart_are_no_documents(converted: Path) -> None:
    """As in the source: a decoder's packed rows would be taken apart."""
    model, ids = model_of(converted), batch(1)["input_ids"]
    halves = torch.arange(SEQ_LEN // 2).repeat(2)[None]
    before = hidden(model, {"input_ids": ids, "position_ids": halves})
    ids[0, -1] = (ids[0, -1] + 1) % START
    after = hidden(model, {"input_ids": ids, "position_ids": halves})
    assert (after - before)[0, : SEQ_LEN // 2].abs().max() > 1e-3


def test_the_verbs_of_decoders_refuse(converted: Path) -> None:
    with pytest.raises(DijiangError, match="predicts no next token: it can't continue"):
        generate(converted, "text")
    with pytest.raises(DijiangError, match="give the original with --baseline"):
        evaluate(converted, data=TEXTS)
    with pytest.raises(DijiangError, match="leave --tasks out"):
        evaluate(converted, baseline=str(converted), data=TEXTS, tasks=["piqa"])
    with pytest.raises(DijiangError, match="transfer: seq_len 512 is beyond the original's context of 128"):
        finetune(converted, data=TEXTS, settings=["seq_len=512"])
    with pytest.raises(DijiangError, match="cross_entropy needs a model that predicts"):
        finetune(converted, data=TEXTS, settings=["distill.objective=cross_entropy"])


def test_bench_times_a_pass_and_inspect_names_no_cache(source: Path, converted: Path) -> None:
    rows = benchmark(converted, baseline=str(source), lengths=(64, 128), repeats=1).rows
    assert {(row.model, row.length) for row in rows} == {(m, n) for m in ("dijiang", "softmax") for n in (64, 128)}
    assert all(r.decode_tokens_per_second is None and r.prefill_tokens_per_second > 0 for r in rows)
    assert all(r.time_to_first_token_seconds is None and r.peak_memory_bytes > 0 for r in rows)
    found = inspect(str(source))
    assert found.supported and found.layers_converted == 2
    assert found.state_bytes == 0 and found.kv_cache_bytes_at is None


# ---------------------------------------------------------------------------------------------------------- finetune


def test_rows_are_whole_texts(converted: Path) -> None:
    tokenizer = load_tokenizer(converted)
    texts = ["a" * 300, "bb"]
    found = token_rows(texts, tokenizer, seq_len=SEQ_LEN, tokens=4 * SEQ_LEN, shuffle_seed=None, whole=True)
    assert found.lengths.tolist() == [128, 128, 50, 4] and not found.packed
    for i, length in enumerate(found.lengths.tolist()):
        row = found[i]
        assert row.keys() == {"input_ids", "attention_mask"} and row["attention_mask"].sum() == length
        assert row["input_ids"][0] == START and row["input_ids"][length - 1] == END
        assert (row["input_ids"] == START).sum() == 1


def test_attention_transfer_learns_from_both_sides(converted: Path) -> None:
    """And padding has no part in it."""
    model, inputs = model_of(converted), batch()
    with transferring(model):
        loss = attention_transfer_loss(model, inputs)
        other = {**inputs, "input_ids": inputs["input_ids"] + 7 * (1 - inputs["attention_mask"])}
        assert loss > 0.01
        torch.testing.assert_close(attention_transfer_loss(model, other), loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".dijiang." in name)


def test_output_loss_is_what_it_says(converted: Path) -> None:
    model, inputs = model_of(converted), batch()
    target, found, mask = (
        hidden(model_of(converted, "softmax"), inputs),
        hidden(model, inputs),
        inputs["attention_mask"],
    )
    expected = 0.0
    for i in range(len(mask)):
        a, b = found[i][mask[i] == 1], target[i][mask[i] == 1]
        expected += (a - b).square().sum() / b.square().sum() + 1 - F.cosine_similarity(a.mean(0), b.mean(0), dim=0)
    loss = output_loss(model, model, inputs, within=lambda: original(model))
    torch.testing.assert_close(loss.detach(), expected / len(mask))
    assert loss.detach() > 0.01
    torch.testing.assert_close(output_loss(model, model, inputs).detach(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_finetune_brings_the_output_closer(source: Path, converted: Path, tuned: Path) -> None:
    held_out = documents("validation")[:3]
    before, after = (
        evaluate(folder, baseline=str(source), data=held_out, max_tokens=4000).likeness for folder in (converted, tuned)
    )
    assert before is not None and after is not None
    assert after.hidden_error < 0.7 * before.hidden_error
    assert after.hidden_cosine > before.hidden_cosine and 0 < after.embedding_cosine <= 1
    assert after.top1_agreement is not None and 0 <= after.top1_agreement <= 1
    same = evaluate(source, baseline=str(source), data=held_out, max_tokens=500).likeness
    assert same is not None and same.hidden_error == 0 and same.top1_agreement == 1


def test_a_finetuned_encoder_is_whole(tuned: Path) -> None:
    """Rows as long as its context by default, the report with its likeness, and all that the source had."""
    history = read_checkpoint(tuned)["dijiang"]["history"]
    assert [step["seq_len"] for step in history] == [SEQ_LEN, SEQ_LEN]
    assert "embedding cosine" in (tuned / "report.html").read_text()
    assert (tuned / "2_Dense/model.safetensors").is_file()
    auto = transformers.AutoModelForMaskedLM.from_pretrained(tuned, trust_remote_code=True).eval()
    inputs = batch()
    assert torch.equal(auto(**inputs).logits, load_any(str(tuned)).eval()(**inputs).logits)


# ------------------------------------------------------------------------------------------------------------ images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of random colours and places, and the image processor's settings beside a converted ViT."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        pixels = torch.zeros(40, 40, 3, dtype=torch.uint8)
        x, y = torch.randint(0, 20, (2,), generator=generator).tolist()
        pixels[x : x + 20, y : y + 20] = torch.randint(0, 256, (3,), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vits")
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=48, patch_size=4,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder / "vit")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 48, "width": 48}}
    (folder / "vit/preprocessor_config.json").write_text(json.dumps(settings))
    convert(str(folder / "vit"), folder / "converted", settings=["window=8", "block=8", "memory=8"])
    return folder


def test_an_image_model_goes_through_every_verb(vit: Path, images: Path) -> None:
    converted, tuned, options = vit / "converted", vit / "tuned", {"data": str(images), "max_tokens": 3 * 145}
    result = finetune(converted, tuned, data=str(images), tokens=20_000)
    assert all(stage.last_loss < stage.first_loss for stage in result.stages)
    before, after = (evaluate(folder, baseline=str(vit / "vit"), **options) for folder in (converted, tuned))
    assert before.tokens == 2 * 145 and before.seq_len == 145  # one in 20 is held out, of 40
    assert before.likeness is not None and after.likeness is not None
    assert after.likeness.hidden_error < 0.8 * before.likeness.hidden_error
    assert "embedding cosine" in (tuned / "report.html").read_text()
    with pytest.raises(DijiangError, match="no length to time it by"):
        benchmark(converted)


def test_images_that_are_none_are_told(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(DijiangError, match="no images in .*: give a folder of .png"):
        finetune(vit / "converted", tmp_path / "out", data=str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DijiangError, match="has 1 images, too few to train"):
        finetune(vit / "converted", tmp_path / "out", data=str(tmp_path))
    with pytest.raises(DijiangError, match="can't read .*a.png"):
        evaluate(vit / "converted", baseline=str(vit / "vit"), data=str(tmp_path))
    with pytest.raises(DijiangError, match="--seq-len 64 is of no use here: an image has 145 tokens"):
        finetune(vit / "converted", tmp_path / "out", data=str(tmp_path), seq_len=64)
    with pytest.raises(DijiangError, match="--seq-len 64 is of no use here"):
        evaluate(vit / "converted", baseline=str(vit / "vit"), data=str(tmp_path), seq_len=64)
    with pytest.raises(DijiangError, match="give a folder of them with --data"):
        evaluate(vit / "converted", baseline=str(vit / "vit"))
