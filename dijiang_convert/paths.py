"""Files that come with the package: recipes/ lies inside it once installed; in a source checkout beside it."""

from pathlib import Path

_INSIDE = Path(__file__).parent / "recipes"
RECIPES = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[1] / "recipes"
ACCELERATE = RECIPES / "accelerate"  # configurations for `accelerate launch`
