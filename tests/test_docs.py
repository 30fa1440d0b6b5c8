"""What README.md and docs/ say is so: commands exist and the README's run, code runs, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from dijiang_convert import convert
from dijiang_convert.cli import app
from dijiang_convert.data.demo_text import documents
from dijiang_convert.demo import MODEL
from tests.hub import Hub
from tests.sources_on_disk import llama_config, write_source

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "notebook.md", *ROOT.glob("docs/*.md")]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

# What the README's commands are run with here: a little text, and a model that is no better for it.
QUICK = {
    "convert": ["--data", "text.txt", "--force"],
    "finetune": ["--data", "text.txt", "--tokens", "2000", "--seq-len", "128", "--force"],
    "eval": ["--data", "text.txt", "--max-tokens", "2000", "--seq-len", "512"],
}
# Code that is tested elsewhere, with what it needs.
ELSEWHERE = {
    "torch.compile": "tests/modeling/test_static_cache.py",
    "SentenceTransformer": "tests/test_sentence_transformers.py",
    "BitsAndBytesConfig": "tests/modeling/test_placement.py",
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(page: Path) -> list[list[str]]:
    """The words behind `dijiang`, in code of any kind."""
    found = re.findall(
        r"(?:^ {4}|^|`)(?:dijiang|accelerate launch .* -m dijiang_convert) ([^`#\n]+)", text_of(page), re.M
    )
    return [shlex.split(re.sub(r"[\[\]]", "", line)) for line in found]


def code(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(page), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_the_options_that_are_shown(page: Path) -> None:
    for name, *words in commands(page):
        if name.startswith("--") or words == ["--help"]:
            continue
        known = {
            option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        shown = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert shown <= known, f"dijiang {name} {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_and_targets_exist(page: Path) -> None:
    makefile = text_of(ROOT / "Makefile")
    for targets in re.findall(r"(?:^ {4}|`)make ([a-z -]+?)(?: *#.*)?(?:`|$)", text_of(page), re.M):
        assert all(f"\n{target}:" in makefile for target in targets.split()), targets
    for script in re.findall(r"python ((?:benchmarks|scripts)/\w+\.py)", text_of(page)):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]*))?\)", text_of(page)):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(target), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{path}#{anchor}"


def test_every_page_is_found_from_the_index() -> None:
    index = text_of(ROOT / "docs" / "README.md")
    assert not [
        page.name for page in ROOT.glob("docs/*.md") if page.name != "README.md" and f"({page.name}" not in index
    ]


def test_the_readme_from_top_to_bottom(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in their order, with the demo's model on the Hub in the place of the one that it names."""
    monkeypatch.chdir(tmp_path)
    hub.add_repo("HuggingFaceTB/SmolLM2-135M-Instruct", MODEL)
    Path("text.txt").write_text("\n".join(documents("train")[:8]), encoding="utf-8")
    lines = re.findall(r"^ {4}dijiang ([^#\n]+)", text_of(ROOT / "README.md"), re.M)
    ran = []
    for line in lines:
        name, *words = shlex.split(line)
        extra = QUICK.get(name, [])
        if name == "convert" and "--calibrate" not in words:
            extra = ["--force"]
        done = CliRunner().invoke(app, [name, *words, *extra])
        assert done.exit_code == 0, f"dijiang {line}: {done.stderr}"
        ran.append(name)
    assert ran == ["convert", "convert", "eval", "finetune", "push"]
    (block,) = code(ROOT / "README.md")
    exec(compile(block, "README.md", "exec"), {})
    assert "config.json" in hub.files("me/SmolLM2-135M-dijiang")


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs" and code(page)], ids=name_of)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after the other, on what the demo converts."""
    monkeypatch.chdir(tmp_path)
    convert(str(MODEL), "dijiang-demo/converted")
    convert(str(write_source(tmp_path / "llama", llama_config())), "smollm2-dijiang")
    names: dict[str, Any] = {}
    for i, block in enumerate(code(page)):
        elsewhere = [ROOT / place for word, place in ELSEWHERE.items() if word in block]
        assert all(place.is_file() for place in elsewhere)
        if not elsewhere:
            exec(compile(block, f"{page.name}, block {i + 1}", "exec"), names)
