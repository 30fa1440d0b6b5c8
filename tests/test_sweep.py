"""A fixed dozen of model types through the checks of `make sweep`, which docs/architectures.md lists for all."""

from __future__ import annotations

import json

import pytest

from tests.sweep.run import ROOT, Outcome, sweep

# Partial and no rotation, grouped heads, experts, latent keys, soft-capping, sinks, sliding and recurrent layers, a
# BERT as decoder, a text model inside a multimodal one, and one that does not follow the interface.
WORKING = (
    "gpt_neox", "opt", "qwen3", "gemma2", "gemma3", "gpt_oss", "mixtral", "deepseek_v3", "smollm3", "qwen3_5", "bert",
)  # fmt: skip
REFUSED = {"falcon": "does not route its attention through AttentionInterface"}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {outcome.kind: outcome for outcome in sweep([*WORKING, *REFUSED], {})}


@pytest.mark.parametrize("kind", WORKING)
def test_type_works(kind: str, outcomes: dict[str, Outcome]) -> None:
    assert outcomes[kind].works, outcomes[kind]
    assert outcomes[kind].figures["far"] > 0.01


@pytest.mark.parametrize("kind", REFUSED)
def test_type_is_refused(kind: str, outcomes: dict[str, Outcome]) -> None:
    assert REFUSED[kind] in outcomes[kind].refused


def test_a_type_that_can_not_be_made_fails() -> None:
    (outcome,) = sweep(["no_such_type"], {}, workers=1)
    assert not outcome.works and not outcome.refused and outcome.failures


def test_the_page_has_every_type() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text())["types"]
    page = (ROOT / "docs" / "architectures.md").read_text()
    assert not [row["type"] for row in results if row.get("failures")]
    assert sum(row["works"] for row in results) >= 100
    assert all(f"\n| {row['type']} |" in page for row in results)
