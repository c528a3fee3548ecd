"""Tasks that `qat train` runs: a LightningModule with its data, one file each; and the demo.

run(recipe)     train, export, report; what `qat train RECIPE` calls
"""

from __future__ import annotations

from typing import Any

from qat.recipes.schema import Recipe

TASKS = ("causal_lm", "image_classification", "sentence_embedding")


def run(recipe: Recipe, *, dry_run: bool = False) -> dict[str, Any]:
    """Train `recipe.train.task` under `recipe`, export to its targets; returns figures and the folders written.

    dry_run plans and rehearses the export on the untrained model and writes nothing.

    Raises QATError for an unknown task and for a model or data that cannot be used. See `qat.tasks.train.run`.
    """
    from qat.tasks.train import run as implementation

    return implementation(recipe, dry_run=dry_run)
