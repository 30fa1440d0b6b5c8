"""The wheel holds all that an installed package needs, and the code that ships in checkpoints stands alone."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dijiang_convert
from dijiang_convert.checkpoint.companions import MODELING_FILES
from dijiang_convert.recipe import recipe_names

ROOT = Path(dijiang_convert.__file__).parents[1]
MODELING = Path(dijiang_convert.__file__).parent / "modeling"


def test_wheel_has_recipes_code_and_demo_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("dijiang_convert-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = [f"recipes/{name}.yaml" for name in recipe_names()]
    wanted += [f"modeling/{name}" for name in MODELING_FILES]
    wanted += [f"demo_model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")]
    assert not {f"dijiang_convert/{name}" for name in wanted} - names
    assert wheel.stat().st_size < 5_000_000


@pytest.mark.parametrize("name", MODELING_FILES)
def test_code_in_checkpoints_imports_torch_transformers_and_itself(name: str) -> None:
    tree = ast.parse((MODELING / name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [str(node.module)]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1
            assert f"{node.module}.py" in MODELING_FILES, "relative imports must be flat: from .file import name"
            continue
        else:
            continue
        for module in modules:
            top = module.partition(".")[0]
            assert top in {"torch", "transformers"} | set(sys.stdlib_module_names), module


def test_the_config_names_every_other_file() -> None:
    """Old versions of transformers fetch only what a file imports itself; the config must get to refuse them."""
    text = (MODELING / "configuration_dijiang.py").read_text(encoding="utf-8")
    for name in set(MODELING_FILES) - {"configuration_dijiang.py"}:
        assert f"from .{name.removesuffix('.py')} import" in text


def test_every_modeling_file_ships() -> None:
    assert {path.name for path in MODELING.glob("*.py")} == {*MODELING_FILES, "__init__.py"}


def test_verbs_are_functions_whatever_was_imported_first() -> None:
    code = (
        "import dijiang_convert.recipe, dijiang_convert.inspect, dijiang_convert as d; "
        "from dijiang_convert.convert import convert; "
        "assert callable(d.inspect) and d.convert is convert; d.no_such_verb"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "has no attribute 'no_such_verb'" in done.stderr
