"""The recipes; each module has `run(recipe, context) -> Result` and is imported only when it is asked for."""

from typing import Final

RECIPES: Final = {
    "prepare": "attune_trainer.recipes.prepare",
    "finetune": "attune_trainer.recipes.finetune",
    "evaluate": "attune_trainer.recipes.evaluate",
    "score": "attune_trainer.recipes.score",
}

# `python -m attune_trainer <name> ...`: modules with `main(argv) -> int | None` that are no Jobs.
COMMANDS: Final = {
    "serve": "attune_trainer.recipes.serve",
}
