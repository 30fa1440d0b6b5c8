import sysconfig
from pathlib import Path

import pytest

from dijiang_convert.data import demo_text
from dijiang_convert.data.demo_text import documents
from dijiang_convert.errors import DijiangError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the standard library."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def write(library: Path, *names: str) -> None:
    """Writes modules whose text is their own name."""
    for name in names:
        path = library / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")


def test_the_splits_are_disjoint_and_the_same_every_time() -> None:
    train, validation = documents("train"), documents("validation")
    assert train and validation
    assert not set(train) & set(validation)
    assert documents("train") == train
    assert documents("validation") == validation


def test_a_few_percent_are_held_out() -> None:
    train, validation = (sum(map(len, documents(split))) for split in ("train", "validation"))
    assert 0.02 < validation / (train + validation) < 0.10


def test_train_and_validation_are_the_same_modules_on_any_python(library: Path) -> None:
    write(library, "heapq.py", "random.py", "subprocess.py", "typing.py")
    assert documents("validation") == ["random.py", "subprocess.py"]
    assert documents("train") == ["heapq.py", "typing.py"]


def test_a_package_stays_on_the_side_of_the_module_it_was(library: Path) -> None:
    write(library, "random/__init__.py", "random/_local.py", "typing/__init__.py")
    assert documents("validation") == ["random/__init__.py", "random/_local.py"]
    assert documents("train") == ["typing/__init__.py"]


def test_only_the_librarys_own_readable_text_is_read(library: Path) -> None:
    write(library, "random.py", "json/decoder.py", "json/tests/test_decoder.py", "test/test_json.py")
    write(library, "site-packages/numpy.py", "dist-packages/numpy.py", "html/entities.py")
    write(library, "idlelib/run.py", "__pycache__/json.py", "_sysconfigdata__linux.py", "notes.txt")
    (library / "latin.py").write_bytes(b"# caf\xe9")
    (library / "empty.py").touch()
    assert documents("train") == ["json/decoder.py"]


def test_no_document_comes_from_a_test_folder() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = {part for module in demo_text._modules(root) for part in module.relative_to(root).parts}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def test_a_library_without_sources_is_one_clear_error(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (library / "json.pyc").touch()
    with pytest.raises(DijiangError, match=r"no Python sources .* run the demo with"):
        documents("train")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library / "python311.zip")})
    with pytest.raises(DijiangError, match=r"no Python sources .*python311\.zip: run the demo with"):
        documents("validation")
