"""What benchmarks/speed.py measures with, and that README.md and docs/ show what it measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from benchmarks import readme, speed
from dijiang_convert.checkpoint.loading import load_any
from dijiang_convert.demo import MODEL
from dijiang_convert.measure.timing import cache_bytes, random_ids, time_forward, with_cache
from dijiang_convert.modeling.configuration_dijiang import Kernel


def test_a_filled_cache_is_as_large_as_one_that_was_read() -> None:
    model = load_any(str(MODEL), torch.device("cpu")).eval()
    filled = speed.filled(model, [40, 60])
    read = speed.read(model, [40, 60])
    for n in (40, 60):
        assert filled[n].get_seq_length() == read[n].get_seq_length() == n
        assert (
            cache_bytes(filled[n])
            == cache_bytes(read[n])
            == time_forward(model, random_ids(model, 1, n), 0).cache_bytes
        )


def test_reading_on_is_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PIECE", 16)
    model = load_any(str(MODEL), torch.device("cpu")).eval()
    ids = torch.arange(50)[None]
    monkeypatch.setattr(speed, "random_ids", lambda *_: ids)
    pieces = speed.read(model, [20, 50])[50]
    whole = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids, **with_cache(model, whole))
    for a, b in zip(pieces.layers, whole.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)


def test_turns_are_taken_and_medians_returned() -> None:
    order: list[str] = []
    values = {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, 9.0, 7.0])}

    def call(name: str) -> Any:
        return lambda: order.append(name) or next(values[name])  # type: ignore[func-returns-value]

    assert speed.in_turns({("a",): call("a"), ("b",): call("b")}, 3) == {("a",): 2.0, ("b",): 7.0}
    assert order == ["a", "b"] * 3


def test_the_whole_script_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PREFILL", (1024, 2048))
    monkeypatch.setattr(speed, "DECODE", (1024, 2048))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    out = tmp_path / "speed-cpu.json"
    speed.main([str(MODEL), "--quick", "--hidden", "64", "--layers", "1", "--out", str(out)])
    content = json.loads(out.read_text())
    sizes = {(row["model"], row["length"]): row["cache_bytes"] for row in content["decode"]}
    assert {name for name, _ in sizes} == {"softmax", *speed.RECIPES}
    assert all(sizes[name, 64] == sizes[name, 128] > 0 for name in speed.RECIPES)
    assert sizes["softmax", 128] == 2 * sizes["softmax", 64]
    assert content["model"]["heads"] == 1 and content["machine"]["threads"] == torch.get_num_threads()
    table = readme.speed_table(content)
    assert table.count("\n") == 2 + 2 + 2 + 2 and "quick run" in readme.setting(content)
    assert readme.growth_table(content).count("\n") == 2 + 1 + 4


def test_a_turn_of_a_converted_model_is_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose table moves once in it."""
    taken: list[int] = []
    monkeypatch.setattr(speed, "time_decoding", lambda model, cache, token, steps: taken.append(steps) or [1.0])
    model = load_any(str(MODEL), torch.device("cpu")).eval()
    speed.time_decode({"converted": model}, [40], repeats=1)
    assert set(taken) == {Kernel().block}


# ----------------------------------------------------------------------------------------------- README.md and docs/


def between(path: Path, mark: str) -> str:
    return path.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")[2].partition(f"<!-- /{mark} -->")[0]


@pytest.mark.parametrize("file, mark", readme.parts())
def test_what_is_shown_is_what_was_measured(file: str, mark: str) -> None:
    """Else: python benchmarks/readme.py"""
    assert between(readme.ROOT / file, mark) == readme.parts()[file, mark]


def test_parts_are_written_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("docs", "benchmarks"):
        (tmp_path / folder).mkdir()
    for file, mark in readme.parts():
        shutil.copy(readme.ROOT / file, tmp_path / file)
        content = (tmp_path / file).read_text(encoding="utf-8")
        (tmp_path / file).write_text(content.replace(between(tmp_path / file, mark), "old\n"), encoding="utf-8")
        assert between(tmp_path / file, mark) == "old\n"
    expected, before = readme.parts(), (readme.ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    readme.main()
    assert all(between(tmp_path / file, mark) == text for (file, mark), text in expected.items())
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == before
    assert (tmp_path / "docs" / "speed.png").stat().st_size > 10_000


def test_settings_are_named_beside_their_recipe() -> None:
    assert readme.label("frequency:window=64,memory=64") == "`frequency`, window 64, memory 64"
    assert readme.in_plot("frequency:window=64,memory=64") == "frequency window 64 memory 64"
    assert [readme.label(name) for name in ("pure", "softmax")] == ["`pure`", "softmax"]


def test_tables_tell_times_softmaxs_speed() -> None:
    def rows(*speeds: tuple[str, int, float]) -> list[dict[str, Any]]:
        return [{"model": m, "length": n, "tokens_per_second": x, "cache_bytes": n * 500_000} for m, n, x in speeds]

    content = {
        "prefill": rows(("softmax", 8, 1000), ("new", 8, 1500), ("softmax", 64, 200), ("new", 64, 1500)),
        "decode": rows(("softmax", 4, 50), ("new", 4, 20), ("softmax", 32, 2), ("new", 32, 20)),
    }
    lines = readme.speed_table(content).splitlines()
    assert lines[2] == "| prefill, tokens a second | 8 | 1,000 | 1,500 | 1.50 × |"
    assert lines[5] == "| decoding, tokens a second | 32 | 2.0 | 20.0 | 10.0 × |"
    assert lines[-2] == "| cache | 4 | 2.0 MB | 2.0 MB | 1.00 × |"
    assert lines[-1] == "| cache | 32 | 16.0 MB | 16.0 MB | 1.00 × |"
    growth = readme.growth_table(content).splitlines()
    assert growth[2:] == [
        "| linear prefill, constant decoding | 8 | 1 |",
        "| softmax | 40.0 | 0.04 |",
        "| `new` | 8.0 | 1.00 |",
    ]
    found = {"bytes": 2e9, "cp_seconds": 2.0, "convert_seconds": 5.0, "startup_seconds": 3.5, "peak_memory_bytes": 4e8}
    (line,) = readme.conversion_table({"cores": 2, "2 GB": found}).splitlines()[2:]
    assert line == "| 2.0 GB | 2.0 s | 5.0 s | 2.50 × | 3.5 s |  | 400.0 MB |"
