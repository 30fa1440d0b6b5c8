"""Recipes: every shipped one is valid, and what is wrong with a user's own is told in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dijiang_convert.errors import DijiangError
from dijiang_convert.modeling.configuration_dijiang import Kernel
from dijiang_convert.recipe import (
    Stage,
    adjust_stages,
    load_recipe,
    parse_recipe,
    parse_settings,
    recipe_names,
    scale_tokens,
)

STAGE = {"name": "distill", "objective": "distillation", "tokens": 1000, "train": "lora"}


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """The one line that a recipe file is refused with."""

    def refuse(content: Any, *settings: str) -> str:
        text = content if isinstance(content, (str, bytes)) else yaml.safe_dump(content)
        (tmp_path / "own.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DijiangError) as call:
            load_recipe(str(tmp_path / "own.yaml"), settings)
        message = str(call.value)
        assert message and "\n" not in message
        return message

    return refuse


def test_the_recipes_of_the_design_are_shipped() -> None:
    assert {"default", "frequency", "pure", "paper", "window-only"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description and recipe.stages
    assert all(isinstance(stage, Stage) for stage in recipe.stages)
    assert parse_recipe(recipe.to_dict()) == recipe  # as a checkpoint's config keeps it


def test_what_the_shipped_recipes_are() -> None:
    assert load_recipe("frequency").kernel == Kernel()
    assert load_recipe("default").kernel == Kernel(memory=896, far=False)
    pure, paper, window = (load_recipe(name).kernel for name in ("pure", "paper", "window-only"))
    assert pure == Kernel(window=0, sinks=0, memory=0, rotary="keep", shift=True)
    assert not window.far and window.window == Kernel().window
    assert (paper.normalize, paper.gate, paper.decay, paper.window) == (False, True, "retnet", 0)
    assert (paper.frequency, paper.projection, paper.learned_features) == ("quasi-random", False, False)
    assert [stage.objective for stage in load_recipe("paper").stages] == ["cross_entropy"]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.yml"
    path.write_text(
        "kernel: {window: 8}\nstages:\n  - {name: a, objective: cross_entropy, tokens: 5, learning_rate: 1e-3}"
    )
    recipe = load_recipe(
        str(path), ["window=4", "block=4", "decay=none", "selective=false", "decay_rank=0", "frequency=2e0"]
    )
    assert recipe.name == "own"
    assert recipe.kernel == Kernel(window=4, block=4, decay="none", selective=False, decay_rank=0, frequency=2.0)
    assert recipe.stages == (Stage("a", "cross_entropy", 5, learning_rate=1e-3),)  # YAML 1.1 reads 1e-3 as text


def test_a_name_that_looks_like_a_number_stays_a_name(tmp_path: Path) -> None:
    (tmp_path / "1e3.yaml").write_text("stages:\n  - {name: '2', objective: cross_entropy, tokens: 5}")
    recipe = load_recipe(str(tmp_path / "1e3.yaml"))
    assert recipe.name == "1e3" and recipe.stages[0].name == "2"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"kernel": {"windw": 3}}, "kernel has no key 'windw': did you mean window?"),
        ({"kernel": {"xyz": 3}}, "kernel has no key 'xyz': valid are window, sinks, memory, block, far, signed"),
        ({"stages": [{**STAGE, "token": 3}]}, "stage distill has no key 'token': did you mean tokens?"),
        ({"stages": [{**STAGE, "lerning_rate": 3}]}, "did you mean learning_rate?"),
        ({"kernels": {}}, "recipe has no key 'kernels': did you mean kernel?"),
        ({3: 4}, "recipe has no key 3"),
        ({"kernel": {3: 4}}, "kernel has no key 3"),
        ({"stages": [{**STAGE, "objective": "distilation"}]}, "no objective 'distilation': did you mean distillation?"),
        ({"stages": [{**STAGE, "train": "qlora"}]}, "train is 'qlora': did you mean lora?"),
        ({"stages": [{**STAGE, "lora_targets": "mlp"}]}, "lora_targets is 'mlp': give attention or all"),
    ],
)
def test_unknown_words_name_the_nearest(content: Any, expected: str, refusal: Callable[..., str]) -> None:
    assert expected in refusal(content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is not a mapping"),
        ("- 1", "is not a mapping"),
        ("a: [", "is not valid YAML"),
        ("a: 2024-13-45", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        ("!!python/object/apply:os.mkdir [x]", "is not valid YAML"),
        ("kernel:", "kernel must be a mapping"),
        ("kernel: 3", "kernel must be a mapping"),
        ("kernel: [1, 2]", "kernel must be a mapping"),
        ("stages: 3", "stages is 3: give a list"),
        ("stages: {a: b}", "stages is {'a': 'b'}: give a list"),
        ("stages:", "stages is None: give a list"),
        ("stages: [3]", "a stage must be a mapping"),
        ("stages: [null]", "a stage must be a mapping"),
        ("stages: [{name: a}]", "stage a lacks objective, tokens"),
        ("stages: [{tokens: 3}]", "stage ? lacks name, objective"),
        ("name: 5", "name is 5, not str"),
        ("data: 3", "recipe: data is 3: give the name of a corpus, or a list of names"),
        ("data: []", "recipe: data is []"),
        ("data: [a, 3]", "recipe: data is ['a', 3]"),
        ("data: {a: 3}", "recipe: data is {'a': 3}"),
        ("stages: [{name: a, objective: cross_entropy, tokens: 5, data: ['']}]", "stage a: data is ['']"),
        ("stages: [{name: a, objective: cross_entropy, tokens: 5, data: 5}]", "stage a: data is 5, not text or a list"),
    ],
)
def test_what_is_no_recipe(content: str | bytes, expected: str, refusal: Callable[..., str]) -> None:
    assert expected in refusal(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", "many"), ("tokens", 1.5), ("tokens", True), ("tokens", 0), ("tokens", -5), ("tokens", None),
        ("seq_len", 0), ("batch_tokens", 0), ("lora_rank", 0), ("learning_rate", "fast"), ("learning_rate", True),
        ("learning_rate", -1e-3), ("learning_rate", float("nan")), ("kernel_learning_rate", float("inf")),
        ("warmup", 1.5), ("warmup", -0.1), ("cross_entropy_weight", 2), ("name", 3), ("weight_decay", [1]),
    ],
)  # fmt: skip
def test_wrong_values_in_a_stage(key: str, value: Any, refusal: Callable[..., str]) -> None:
    message = refusal({"stages": [{**STAGE, key: value}]})
    assert message.startswith("stage ") and f"{key} is {value!r}" in message


@pytest.mark.parametrize(
    "setting",
    [
        "window=-1", "window=1.5", "window=big", "window=true", "far=1", "far=maybe", "frequency=0", "frequency=-2",
        "frequency=nan", "frequency=sobol", "rotary=undo", "rotary=1", "decay=mamba", "signed=no-no",
        "window=100", "block=0", "block=1.5", "sinks=-1", "sinks=some", "memory=-1", "memory=1.5",
    ],
)  # fmt: skip
def test_wrong_values_in_the_kernel(setting: str) -> None:
    with pytest.raises(DijiangError) as call:
        load_recipe("frequency", [setting])
    assert f"kernel.{setting.partition('=')[0]}" in str(call.value) and "\n" not in str(call.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["far=false", "window=0", "sinks=0", "memory=0"], "nothing is left to attend to"),
        (["normalize=false"], "the window needs the denominator"),
        (["window=0"], "set kernel.sinks and kernel.memory to 0"),
        (["window=32"], "kernel.window is 32, no whole multiple of kernel.block, 64"),
        (["frequency=quasi-random"], "set kernel.learned_features false"),
    ],
)
def test_impossible_kernels(settings: list[str], expected: str) -> None:
    with pytest.raises(DijiangError, match=expected):
        load_recipe("frequency", settings)


@pytest.mark.parametrize("setting", ["signed=false", "rotary=keep", "decay=none", "shift=true", "decay_rank=8"])
def test_a_key_of_the_state_where_there_is_none(setting: str) -> None:
    message = f"kernel.{setting.partition('=')[0]} is of the state, which recipe default has not"
    with pytest.raises(DijiangError, match=message):
        load_recipe("default", [setting])
    assert load_recipe("default", [setting, "far=true", *(["selective=false", "decay_rank=0"] * ("none" in setting))])


def test_a_file_with_a_key_of_the_state_where_there_is_none(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("kernel: {far: false, shift: true}\nstages: []\n")
    with pytest.raises(DijiangError, match="kernel.shift is of the state, which recipe mine has not"):
        load_recipe(str(file))
    assert load_recipe(str(file), ["far=true"]).kernel.shift
    assert not load_recipe("encoder", ["far=false"]).kernel.far


@pytest.mark.parametrize("train", ["lora", "full"])
def test_attention_transfer_trains_the_kernel_alone(train: str) -> None:
    with pytest.raises(DijiangError, match="attention_transfer trains the kernel alone"):
        Stage("a", "attention_transfer", 10, train)


@pytest.mark.parametrize("setting", ["window", "=3", "window=", "window=[", "window={a", "window=2024-13-45", ""])
def test_settings_that_are_none(setting: str) -> None:
    with pytest.raises(DijiangError) as call:
        parse_settings([setting])
    assert "--set" in str(call.value) and "\n" not in str(call.value)


def test_settings_are_read_as_yaml() -> None:
    settings = ["a=16", "b=1e-3", "c=false", "d=keep", "e = 2", "f=x=y"]
    assert parse_settings(settings) == {"a": 16, "b": 1e-3, "c": False, "d": "keep", "e": 2, "f": "x=y"}


def test_unknown_setting() -> None:
    with pytest.raises(DijiangError, match="kernel has no key 'widow': did you mean window"):
        load_recipe("default", ["widow=3"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("defualt", "no recipe 'defualt': did you mean default?; or give a .yaml file"),
        ("zzz", f"valid are {', '.join(recipe_names())}"),
        ("nowhere/own.yaml", "no such recipe file: nowhere/own.yaml"),
    ],
)
def test_no_such_recipe(name: str, expected: str) -> None:
    with pytest.raises(DijiangError) as call:
        load_recipe(name)
    assert expected in str(call.value)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").mkdir()
    with pytest.raises(DijiangError, match="can't read recipe"):
        load_recipe(str(tmp_path / "own.yaml"))


STAGES = (
    Stage("a", "attention_transfer", 10_000_000, seq_len=512),
    Stage("b", "distillation", 30_000_000, "lora", seq_len=512),
)


def test_a_recipe_and_its_stages_name_one_corpus_or_several(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    stage = "{name: extend, objective: cross_entropy, tokens: 5, data: [long/*.txt@2, 1e3]}"
    path.write_text(f"data: [a.txt, 'b.jsonl@0.5']\nstages: [{stage}]")
    recipe = load_recipe(str(path))
    assert recipe.data == ["a.txt", "b.jsonl@0.5"]
    assert parse_recipe(recipe.to_dict()) == recipe
    (adjusted,) = adjust_stages(recipe.stages, ["extend.data=[c.txt, d.txt]"])
    assert adjusted.data == ["c.txt", "d.txt"]
    assert adjust_stages(recipe.stages, ["data=c.txt"])[0].data == "c.txt"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (4_000_000, (1_000_000, 3_000_000)),
        (80_000_000, (20_000_000, 60_000_000)),
        (40_000_000, (10_000_000, 30_000_000)),
        (1, (512, 512)),
        (1200, (512, 900)),
    ],
)
def test_scaled_tokens_keep_their_proportion(tokens: int, expected: tuple[int, ...]) -> None:
    """As far as every stage is left one row."""
    scaled = scale_tokens(STAGES, tokens)
    assert tuple(stage.tokens for stage in scaled) == expected
    assert [(stage.name, stage.objective, stage.seq_len) for stage in scaled] == [
        (stage.name, stage.objective, stage.seq_len) for stage in STAGES
    ]


def test_stages_are_adjusted_all_or_by_name() -> None:
    adjusted = adjust_stages(STAGES, ["batch_tokens=1024", "b.learning_rate=1e-3", "a.seq_len=64"])
    assert [stage.batch_tokens for stage in adjusted] == [1024, 1024]
    assert [stage.learning_rate for stage in adjusted] == [STAGES[0].learning_rate, 1e-3]
    assert [stage.seq_len for stage in adjusted] == [64, 512]
    assert adjust_stages(STAGES, []) == STAGES


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("c.tokens=3", "no stage 'c'"),
        ("token=3", "stage has no key 'token': did you mean tokens?"),
        ("b.token=3", "did you mean tokens?"),
        ("tokens=1.5", "tokens is 1.5, not int"),
        ("tokens=0", "tokens is 0: give at least 1"),
        ("train=lora", "stage a: attention_transfer trains the kernel alone"),
        ("objective=guess", "no objective 'guess'"),
    ],
)
def test_stages_can_not_be_adjusted_to_nonsense(setting: str, expected: str) -> None:
    with pytest.raises(DijiangError) as call:
        adjust_stages(STAGES, [setting])
    assert expected in str(call.value)
