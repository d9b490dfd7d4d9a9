"""Draw docs/quickstart.svg from a real run of the quickstart: ``python docs/make_picture.py`` (some minutes)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from luthier.pipeline import run
from luthier.recipe import Recipe
from luthier.training.progress import TerminalReporter

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    console = Console(record=True, width=104)
    recipe = Recipe.load(ROOT / "examples" / "records" / "recipe.yaml", ["evaluation.samples=2"])
    console.print("$ luthier train examples/records/recipe.yaml", highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        recipe.output_dir = folder + "/records"
        run(recipe, console=console, reporter=TerminalReporter(console))
    console.save_svg(str(ROOT / "docs" / "quickstart.svg"), title="luthier")


if __name__ == "__main__":
    main()
