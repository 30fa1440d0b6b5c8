"""Values of options that mean nothing: the command does its work, or refuses and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from dijiang_convert.modeling.configuration_dijiang import Kernel
from dijiang_convert.recipe import Stage
from tests.bad_input.conftest import Place
from tests.bad_input.mutations import NUMBERS
from tests.bad_input.trying import answer, both_scales, run, try_all

WORDS = (
    "", " ", "a", "all", "none", "auto", "-1", "0", "1", "2", "007", "1e3", "٣", "a" * 5000, "\x1b[31m", "line\nline",
    "9" * 5000, "\u202e", "\udcff", "../..", "..", ".",
    "/dev/null", "/proc/none", "~nobody/x", "a=b", "[a", "{a: [", "a,b", "*", "**",
    "@2", "a@nan", "owner/name", "owner/name:config", "%s", "[/bold]", "'", "--json",
)  # fmt: skip
numbers = st.sampled_from(NUMBERS).map(lambda number: f"{number}")
words = st.one_of(st.sampled_from(WORDS), numbers)
settings_of = {
    "convert": [field.name for field in dataclasses.fields(Kernel)],
    "finetune": [field.name for field in dataclasses.fields(Stage)],
}
FORMS = ("{}", "every:{}", "not-every:{}", "not-last:{}", "auto:{}", "0-{}", "{}-1", "0,{}", "all,{}", ",{}", "0-{}-1")
layers = st.tuples(st.sampled_from(FORMS), words).map(lambda pair: pair[0].format(pair[1]))
sources = st.sampled_from(("source", "source/", "source/config.json", "./source/../source", "converted"))


def settings(verb: str) -> st.SearchStrategy[str]:
    """``--set`` of a key that there is, and seldom of another, with any value."""
    keys = st.sampled_from([*settings_of[verb], *settings_of[verb], "none", "", "distill.tokens", "a.b.c"])
    return st.tuples(keys, words).map("=".join)


# Values of each option; None stands for options without a value.
OPTIONS: dict[str, dict[str, st.SearchStrategy[str] | None]] = {
    "convert": {
        "--out": words, "--recipe": words, "--revision": words, "--dtype": words, "--layers": layers,
        "--set": settings("convert"), "--data": words, "--link": None, "--dry-run": None, "--force": None,
    },
    "inspect": {"--recipe": words, "--revision": words, "--layers": layers, "--set": settings("convert")},
    "finetune": {
        "--out": words, "--data": words, "--tokens": words, "--stage": words, "--skip": words, "--seq-len": words,
        "--set": settings("finetune"), "--teacher": words, "--seed": words, "--full": None, "--lora": None,
        "--resume": None, "--force": None,
    },
    "eval": {"--baseline": words, "--data": words, "--seq-len": words, "--max-tokens": words, "--recall": None},
}  # fmt: skip
USUAL = {
    "convert": {"--out": "out"},
    "inspect": {},
    "finetune": {"--out": "out", "--data": "text.txt", "--tokens": "64", "--seq-len": "16", "--teacher": "source"},
    "eval": {"--data": "text.txt", "--seq-len": "16", "--max-tokens": "64"},
}


@st.composite
def command(draw: Any) -> list[str]:
    """A verb, what it works on, and its usual options, of which one to three were given other values."""
    verb = draw(st.sampled_from(("convert", "convert", "inspect", "finetune", "eval")))
    usual = "source" if verb in ("convert", "inspect") else "converted"
    subject = draw(st.sampled_from((usual, usual, usual, draw(sources), draw(words))))
    chosen: dict[str, str | None] = dict(USUAL[verb])
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        option = draw(st.sampled_from(list(OPTIONS[verb])))
        values = OPTIONS[verb][option]
        chosen[option] = None if values is None else draw(values)
    options = [name if value is None else f"{name}={value}" for name, value in chosen.items()]
    return [verb, *options, "--json", "--", subject]


@both_scales
def test_options(scale: int, good: Path, place: Place) -> None:
    def example(arguments: list[str]) -> str:
        verb, *options = arguments
        dry = ["--dry-run"] if verb == "finetune" else []
        with place():
            Path("converted").symlink_to(good / "converted")
            Path("text.txt").write_text("The sea is deep. " * 40)
            result = run(verb, *dry, *options)
            if result is None:
                return "refused"
            told = json.loads(result.stdout)
            if verb == "convert" and not told["dry_run"]:
                answer(Path(told["out"]))
            if verb == "eval":
                assert math.isfinite(told["perplexity"])
        return "done"

    try_all("options", scale, command(), example)
