"""The further modules of a sentence-transformers model, which lie in folders beside the Transformer."""

from pathlib import Path
from typing import Any

from ..errors import DijiangError, Unsupported
from ..files import read_any_json
from .download import is_plain

WITHOUT_FILES = ("Normalize",)  # modules that need no files


def module_folders(folder: Path) -> list[str]:
    """The folders of a sentence-transformers model, from its modules.json; none for other models.

    They hold what follows the Transformer: pooling, dense layers, normalisation. Git and the Hub keep no empty folder,
    so that of a module without files may be missing. Raises DijiangError if another is missing or no folder of the
    model's own, and Unsupported for modules with code of their own.
    """
    if not (folder / "modules.json").is_file():
        return []
    try:
        modules: Any = read_any_json(folder / "modules.json")
        paths = {str(each["path"]): str(each["type"]) for each in modules}
    except (KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DijiangError(f"{folder / 'modules.json'} can't be read ({reason}): get it again") from error
    own = [kind for kind in paths.values() if not kind.startswith("sentence_transformers.")]
    if own:
        raise Unsupported(f"modules.json names {own[0]}, code of the model's own: only sentence-transformers' modules")
    found = []
    for name, kind in paths.items():
        if not name or (kind.rpartition(".")[2] in WITHOUT_FILES and not (folder / name).exists()):
            continue
        if not (is_plain(name) and (folder / name).is_dir()):
            raise DijiangError(f"modules.json names {name}, no folder of {folder}: get the model again")
        found.append(name)
    return found
