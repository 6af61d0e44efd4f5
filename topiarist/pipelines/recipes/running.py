"""The stages of a recipe, run one after the other: each resumes, and leaves what the next one begins with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from topiarist.checkpoints.atomic import write_atomically
from topiarist.checkpoints.finished import check_finished
from topiarist.checkpoints.journal import differences, listed, read_sealed, sealed
from topiarist.checkpoints.locking import FolderLock
from topiarist.checkpoints.writing import REPORT
from topiarist.checkpoints.writing import STAGES as STAGES_FOLDER
from topiarist.core.errors import DamagedWeights, TopiaristError
from topiarist.models.opened import open_model
from topiarist.pipelines.common.options import Progress
from topiarist.pipelines.common.reproduce import RECIPE, as_yaml
from topiarist.pipelines.recipes.ends import EvalOptions, check_eval
from topiarist.pipelines.recipes.reading import parse, read_text
from topiarist.pipelines.recipes.recipe import Recipe
from topiarist.pipelines.recipes.stages import STAGES
from topiarist.runtime.manifest import MANIFEST

MADE = "made.json"
"""In OUT's folder of stages: the recipe as far as its stages are finished."""


def run_recipe(recipe: Recipe, *, keep_stages: bool = False, progress: Progress | None = None) -> Any:
    """Run the stages one after the other, and return the report of the last that changes the model.

    Every stage but the last writes to a folder inside OUT that goes when the next stage is finished; `keep_stages` keeps them.
    The same recipe on the same OUT goes on where a killed run was. Raises a TopiaristError for everything a user can mend,
    before any work where that can be known before.
    """
    recipe.check_whole()
    out = Path(recipe.out)
    said = json.loads(json.dumps({**recipe.plain, "out": str(out)}, default=str))
    if (out / RECIPE).is_file() and (out / REPORT).is_file() and not (out / STAGES_FOLDER).exists():
        _check_same(out, parse(read_text(out / RECIPE), str(out / RECIPE))[0], said)
        check_finished(out)
    else:
        _check_ends(recipe)
        with _stages_folder(out) as places:
            _run_stages(recipe, out, places, said, keep_stages, progress or (lambda *_: None))
            write_atomically(out / RECIPE, as_yaml(said))
            if not keep_stages:
                shutil.rmtree(places, ignore_errors=True)
    return recipe.steps[recipe.final].stage.report.from_folder(out)


def _check_ends(recipe: Recipe) -> None:
    """Raise what eval, which comes last, would raise after hours."""
    for step in recipe.steps:
        if isinstance(step.options, EvalOptions):
            with recipe.telling(step):
                trusted = step.options.trust_remote_code
                check_eval(open_model(recipe.model, device="cpu", trust_remote_code=trusted), step.options)


def _check_same(out: Path, written: Any, said: Mapping[str, Any]) -> None:
    """Raise TopiaristError, naming what differs, if `out` was made by another recipe than the one that is said."""
    if not isinstance(written, Mapping) or not isinstance(written.get("stages"), list):
        raise TopiaristError(f"{out / RECIPE} is no recipe any more: choose another output, or delete {out}")
    named = list(differences(_by_stage(written), _by_stage(said)))
    if named:
        raise TopiaristError(f"{out} holds another run: {listed(named)}. Choose another output, or delete it")


def _by_stage(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with its stages by number, as differences between two are told."""
    stages = {f"stage {number}": stage for number, stage in enumerate(plain["stages"], start=1)}
    return {key: value for key, value in plain.items() if key != "stages"} | stages


@contextmanager
def _stages_folder(out: Path) -> Iterator[Path]:
    """OUT's folder for what stages but the last write, locked; both go again after an error, unless something is in them."""
    places, made = out / STAGES_FOLDER, not out.exists()
    lock = FolderLock(places)
    lock.acquire()
    try:
        yield places
    except BaseException as error:
        if made and isinstance(error, DamagedWeights) and not (places / MADE).exists():
            shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        lock.release()
        with suppress(OSError):  # of a folder that is not empty
            places.rmdir()
            out.rmdir()


def _run_stages(
    recipe: Recipe, out: Path, places: Path, said: Mapping[str, Any], keep_stages: bool, progress: Progress
) -> None:
    """Run the stages that are not finished yet. said: the recipe, as OUT will have it."""
    model, allocation = recipe.model, None
    done = _done(recipe, out, places, said)
    changed = max((number for number in range(done) if recipe.steps[number].changes), default=-1)
    if 0 <= changed < recipe.final:
        check_finished(_place(places, changed, recipe.steps[changed].name, recipe.final))
    for number, step in enumerate(recipe.steps):
        place = _place(places, number, step.name, recipe.final)
        options = step.options
        if step.name == "prune" and allocation is not None:
            options = replace(options, allocation=allocation)
        if step.name == "pack":  # it works in OUT itself: what a kill leaves is of these settings
            _note(places, said, number)
        if number >= done or step.name == "pack":
            if not step.stage.ends and model != recipe.model:
                options = replace(options, stands_for=recipe.model)
            if step.stage.to_file:
                place.unlink(missing_ok=True)  # not what an earlier try wrote
            with recipe.telling(step):
                step.stage.run(out if step.stage.ends else model, place, options, step.more, progress)
            _note(places, said, number)
            if step.changes and not keep_stages:
                _forget(places, place)
        if step.stage.to_file:
            allocation = place
        elif step.changes:
            model, allocation = str(place), None


def _place(places: Path, number: int, name: str, final: int) -> Path:
    """Where a stage writes: the last that changes the model to OUT, all others into the folder of stages."""
    stage = STAGES[name]
    if number == final:
        return places.parent
    return places / f"{number + 1:02d}-{name}{'.json' if stage.to_file or name == 'eval' else ''}"


def _note(places: Path, said: Mapping[str, Any], number: int) -> None:
    """Keep the recipe as far as this stage, which is finished: its result is of these settings and of no others."""
    write_atomically(places / MADE, sealed(_so_far(said, number + 1)))


def _so_far(said: Mapping[str, Any], done: int) -> dict[str, Any]:
    """The recipe of the first stages alone, without OUT, which may be moved meanwhile."""
    return {key: value for key, value in said.items() if key != "out"} | {"stages": said["stages"][:done]}


def _done(recipe: Recipe, out: Path, places: Path, said: Mapping[str, Any]) -> int:
    """How many stages are finished. Raises TopiaristError if one was finished with other settings."""
    if (written := read_sealed(places / MADE)) is None:
        return 0
    names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in written["stages"]]

    def stands(number: int) -> bool:
        """Whether what the stage left is there."""
        name, place = names[number], _place(places, number, names[number], recipe.final)
        if STAGES[name].to_file:
            return read_sealed(place) is not None
        if name == "pack":
            return any((folder / MANIFEST).is_file() for folder in (place, out))
        return place.is_file() if STAGES[name].ends else (place / REPORT).is_file()

    def goes_on(done: int) -> bool:
        """Whether the stages behind so many can go on: from the last, and from the last model."""
        models = [number for number in range(done) if not (STAGES[names[number]].to_file or STAGES[names[number]].ends)]
        return all(map(stands, {done - 1, *models[-1:]}))

    done = next(done for done in range(len(names), -1, -1) if not done or goes_on(done))
    if done:
        _check_same(out, _so_far(written, done), _so_far(said, done))
    return done


def _forget(places: Path, but: Path) -> None:
    """Remove the results of earlier stages; the one whose result is finished needs them no more."""
    for path in places.iterdir():
        if path != but and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
