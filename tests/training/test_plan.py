"""The plan of a run: stages in any order, rows beyond the source's context, and what a longer context leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from dijiang_convert import DijiangError, convert, finetune
from dijiang_convert.checkpoint.loading import converted_config, load_converted
from dijiang_convert.checkpoint.shards import read_checkpoint, write_json
from dijiang_convert.cli import app
from dijiang_convert.modeling.configuration_dijiang import Kernel, Layers
from dijiang_convert.recipe import Recipe, Stage, load_recipe, parse_recipe
from dijiang_convert.training import schedule
from dijiang_convert.training.plan import (
    check_context,
    extended_config,
    has_rotary_positions,
    make_plan,
    rows_too_short,
    source_context,
)
from tests.models import logits_of, randomise, tokens
from tests.sources_on_disk import TOKENS, VOCABULARY, llama_config, neox_config, write_source

CONTEXT = 64
RECIPE = """
kernel: {window: 8, block: 8, memory: 8}
stages:
  - {name: transfer, objective: attention_transfer, tokens: 1000, seq_len: 32}
  - {name: distill, objective: distillation, train: lora, tokens: 3000, seq_len: 32}
  - {name: extend, objective: cross_entropy, train: lora, tokens: 1000, seq_len: 128}
"""
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 1.5},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 1.5, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 1.5},
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "three.yaml").write_text(RECIPE)
    return str(tmp_path / "three.yaml")


def small(kind: str, **changes: Any) -> Any:
    changes = {"num_hidden_layers": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.25, **changes}
    if kind == "llama":
        return llama_config(**changes)
    if kind == "neox":
        return neox_config(**changes)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCABULARY, **TOKENS}
    if kind == "qwen2":
        return transformers.Qwen2Config(intermediate_size=64, num_key_value_heads=2, **shape, **changes)
    if kind == "opt":
        return transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **shape, **changes)
    return transformers.GPT2Config(**shape, **changes)


def converted(kind: str, folder: Path, recipe: str, **changes: Any) -> Path:
    convert(str(write_source(folder / kind, small(kind, **changes))), folder / f"{kind}-dj", recipe=recipe)
    return folder / f"{kind}-dj"


def three() -> Recipe:
    stage = {"tokens": 1000, "seq_len": 32}
    return parse_recipe(
        {
            "name": "three",
            "stages": [
                {"name": "transfer", "objective": "attention_transfer", **stage},
                {"name": "distill", "objective": "distillation", "train": "lora", **stage, "tokens": 3000},
                {"name": "extend", "objective": "cross_entropy", "train": "lora", **stage, "seq_len": 128},
            ],
        }
    )


# ----------------------------------------------------------------------------------------------------- stage order


@pytest.mark.parametrize(
    ("names", "skip", "expected"),
    [
        ([], [], ["transfer", "distill", "extend"]),
        (["transfer", "distill", "distill"], [], ["transfer", "distill", "distill"]),
        (["extend", "transfer"], [], ["extend", "transfer"]),
        ([], ["transfer"], ["distill", "extend"]),
        (["transfer", "distill", "transfer"], ["transfer"], ["distill"]),
    ],
)
def test_stages_run_in_the_order_and_as_often_as_named(names: list[str], skip: list[str], expected: list[str]) -> None:
    assert [stage.name for stage in make_plan(three(), names, skip)] == expected


def test_tokens_are_shared_in_proportion_over_what_runs() -> None:
    plan = make_plan(three(), ["transfer", "distill", "distill"], tokens=70_000)
    assert [stage.tokens for stage in plan] == [10_000, 30_000, 30_000]
    assert [stage.tokens for stage in make_plan(three(), skip=["distill"], tokens=4000)] == [2000, 2000]


def test_settings_reach_every_stage_of_their_name() -> None:
    plan = make_plan(three(), ["distill", "extend", "distill"], seq_len=64, settings=["distill.lora_rank=4"])
    assert [stage.lora_rank for stage in plan] == [4, 16, 4]
    assert {stage.seq_len for stage in plan} == {64}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stages": ["extnd"]}, "no stage 'extnd': valid are transfer, distill, extend"),
        ({"skip": ["extnd"]}, "no stage 'extnd': valid are transfer, distill, extend"),
        ({"skip": ["transfer", "distill", "extend"]}, "no stages to run: --skip leaves none"),
        ({"stages": ["transfer"], "train": "full"}, "--full is of no use here: transfer trains the kernel alone"),
    ],
)
def test_a_plan_without_sense_is_one_line(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(DijiangError, match=expected):
        make_plan(three(), **options)


def test_the_long_recipe_ends_on_rows_four_times_as_long() -> None:
    default, long = load_recipe("default"), load_recipe("long")
    assert long.kernel == default.kernel
    assert long.stages[:1] == default.stages
    assert long.stages[1].objective == "cross_entropy"
    assert long.stages[1].seq_len == 4 * default.stages[0].seq_len


# ------------------------------------------------------------------------------------------------- longer contexts


@pytest.mark.parametrize("objective", ["attention_transfer", "distillation"])
def test_no_teacher_is_followed_beyond_its_context(objective: str, tmp_path: Path, recipe: str) -> None:
    config = converted_config(converted("llama", tmp_path, recipe))
    name = "transfer" if objective == "attention_transfer" else "distill"
    for length, fits in ((CONTEXT, True), (CONTEXT + 1, False)):
        plan = make_plan(load_recipe(recipe), [name], seq_len=length)
        if fits:
            check_context(plan, config)
            continue
        with pytest.raises(DijiangError, match=f"stage {name}: seq_len 65 is beyond the original's context of 64"):
            check_context(plan, config)


def test_a_recipes_rows_are_shortened_to_the_teachers_context(tmp_path: Path) -> None:
    """Of the stages that have one; a row length that was asked for is an error."""
    folder = converted("llama", tmp_path, "long")
    plan = finetune(folder, data=["a text"], dry_run=True).plan
    assert plan is not None and [cost.seq_len for cost in plan] == [CONTEXT, 8192]
    for asked in ({"seq_len": 128}, {"settings": ["distill.seq_len=128"]}):
        with pytest.raises(DijiangError, match="beyond the original's context of 64"):
            finetune(folder, data=["a text"], dry_run=True, **asked)


def test_rope_scaling_stretches_the_teachers_context(tmp_path: Path, recipe: str) -> None:
    config = converted_config(converted("llama", tmp_path, recipe, rope_parameters=dict(YARN)))
    assert source_context(config) == 4 * CONTEXT
    check_context(make_plan(load_recipe(recipe), ["distill"], seq_len=4 * CONTEXT), config)


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_learned_positions_have_an_end(kind: str, tmp_path: Path, recipe: str) -> None:
    folder = converted(kind, tmp_path, recipe)
    assert not has_rotary_positions(converted_config(folder))
    with pytest.raises(DijiangError, match=f"stage extend: seq_len 128 is beyond the 64 positions that {kind} has"):
        finetune(folder, tmp_path / "out", data=["no text is read " * 200])
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("kind", ["llama", "neox", "qwen2"])
@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn"])
def test_the_longer_context_is_recorded_and_logits_stay(kind: str, rope: str, tmp_path: Path, recipe: str) -> None:
    """Both on short rows and on those that the last stage trained on."""
    parameters = dict(ROPES[rope]) | ({"partial_rotary_factor": 0.25} if kind == "neox" else {})
    folder = converted(kind, tmp_path, recipe, rope_parameters=parameters)
    if rope == "yarn":  # as some repositories have it: everything follows from max_position_embeddings
        config = read_checkpoint(folder)
        config["rope_parameters"] |= {"factor": None, "original_max_position_embeddings": CONTEXT // 2}
        write_json(folder / "config.json", config)
    ids, context = tokens(1, 128), source_context(converted_config(folder))
    before = logits_of(randomise(load_converted(folder, "dijiang")).eval(), ids)
    write_json(folder / "config.json", extended_config(read_checkpoint(folder), converted_config(folder), 128))
    assert converted_config(folder).max_position_embeddings == 128
    assert source_context(converted_config(folder)) == context
    after = logits_of(randomise(load_converted(folder, "dijiang")).eval(), ids)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_context_that_is_long_enough_is_left_alone(tmp_path: Path, recipe: str) -> None:
    folder = converted("llama", tmp_path, recipe)
    content = read_checkpoint(folder)
    assert extended_config(content, converted_config(folder), CONTEXT) == content


def test_a_run_of_three_stages_ends_with_a_longer_context(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "LEAST_STEPS", 2)
    folder = converted("llama", tmp_path, recipe)
    text = ["".join(chr(97 + (i * i + j) % 26) for i in range(3000)) for j in range(4)]
    result = finetune(folder, tmp_path / "out", data=text)
    assert [stage.name for stage in result.stages] == ["transfer", "distill", "extend"]
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["max_position_embeddings"] == 128
    assert content["dijiang"]["source_context"] == CONTEXT
    assert [step["seq_len"] for step in content["dijiang"]["history"]] == [32, 32, 128]
    load_converted(tmp_path / "out")
    with pytest.raises(DijiangError, match="the original's context of 64"):  # the teacher's did not grow
        finetune(tmp_path / "out", data=text, stages=["distill"], seq_len=128, teacher=str(tmp_path / "llama"))
    repeated = finetune(folder, tmp_path / "again", data=text, stages=["distill", "transfer", "distill"], tokens=2000)
    assert [stage.name for stage in repeated.stages] == ["distill", "transfer", "distill"]


def test_the_command_line_takes_an_order_and_what_to_skip(tmp_path: Path, recipe: str) -> None:
    folder = converted("llama", tmp_path, recipe)
    (tmp_path / "text.txt").write_text("to be or not to be, " * 200)
    options = ["--data", str(tmp_path / "text.txt"), "--tokens", "600", "--seq-len", "32", "--json"]
    done = CliRunner().invoke(app, ["finetune", str(folder), "--skip", "transfer", "--skip", "extend", *options])
    assert done.exit_code == 0, done.stderr
    assert [stage["name"] for stage in json.loads(done.stdout)["stages"]] == ["distill"]


def test_rows_that_the_table_holds_are_told() -> None:
    distill = Stage("distill", "distillation", 10_000, "lora", seq_len=512)
    kernel, layers = Kernel(memory=384, window=128, far=False), Layers("A", "attn", (0, 1), 2, 2, 8, 8, 16)
    assert [*rows_too_short([distill], kernel, layers)] == [
        "warning: stage distill has rows of 512 tokens, and the table holds 516: there is nothing to learn; "
        "take longer rows, or convert with a smaller memory"
    ]
    shared = replace(layers, memory=((500, 268), (384, 384)))
    assert not [*rows_too_short([distill], kernel, shared)]  # one head has a smaller memory
    extend = replace(distill, objective="cross_entropy")
    assert not [*rows_too_short([extend, replace(distill, seq_len=517)], kernel, layers)]
