"""What the stages of a recipe will need, each as its own command says it."""

from __future__ import annotations

from topiarist.core.meter import reset_peak_memory
from topiarist.pipelines.recipes.recipe import Recipe


def plan_recipe(recipe: Recipe) -> list[tuple[str, list[tuple[str, str]]]]:
    """Say for every stage, in order, what it will need: (its title, lines of what and how much). Writes nothing.

    What a stage changes is not there yet, so later ones are probed on the model that the recipe starts from, whose weights
    are no fewer: their needs are upper bounds, and say so. Raises what `run_recipe` raises before any work, and what the
    plans of the commands raise.
    """
    recipe.check_whole()
    found: list[tuple[str, list[tuple[str, str]]]] = []
    changed = False
    for number, step in enumerate(recipe.steps, start=1):
        title = f"{number} {step.name}" + (", at most: as on the model that the recipe starts from" if changed else "")
        dense = {"teacher": recipe.model} if changed and "teacher" in step.stage.more else {}
        reset_peak_memory()
        with recipe.telling(step):
            found.append((title, step.stage.plan(recipe.model, step.options, {**dense, **step.more})))
        changed |= step.changes
    return found
