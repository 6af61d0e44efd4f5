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
from topiarist.checkpoints.journal import differences, listed, read_sealed
from topiarist.checkpoints.locking import FolderLock
from topiarist.checkpoints.writing import REPORT
from topiarist.checkpoints.writing import STAGES as STAGES_FOLDER
from topiarist.core.errors import DamagedWeights, TopiaristError
from topiarist.pipelines.common.options import Progress
from topiarist.pipelines.common.reproduce import RECIPE, as_yaml
from topiarist.pipelines.recipes.reading import parse, read_text
from topiarist.pipelines.recipes.recipe import Recipe
from topiarist.runtime.manifest import MANIFEST, read_manifest


def run_recipe(recipe: Recipe, *, keep_stages: bool = False, progress: Progress | None = None) -> Any:
    """Run the stages one after the other, and return the report of the last that changes the model.

    Every stage but the last writes to a folder inside OUT that goes when the next stage is finished; `keep_stages` keeps them.
    The same recipe on the same OUT goes on where a killed run was. Raises a TopiaristError for everything a user can mend,
    before any work where that can be known before.
    """
    recipe.check_whole()
    out = Path(recipe.out)
    said = {**recipe.plain, "out": str(out)}
    if (out / RECIPE).is_file() and (out / REPORT).is_file() and not (out / STAGES_FOLDER).exists():
        written, _ = parse(read_text(out / RECIPE), str(out / RECIPE))
        named = list(differences(_by_stage(written), _by_stage(json.loads(json.dumps(said, default=str)))))
        if named:
            raise TopiaristError(f"{out} holds another run: {listed(named)}. Choose another output, or delete it")
        _check_finished(out)
    else:
        with _stages_folder(out) as places:
            _run_stages(recipe, out, places, said, keep_stages, progress or (lambda *_: None))
            write_atomically(out / RECIPE, as_yaml(said))
            if not keep_stages:
                shutil.rmtree(places, ignore_errors=True)
    return recipe.steps[recipe.final].stage.report.from_folder(out)


def _by_stage(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with its stages by number, as differences between two are told."""
    stages = {f"stage {number}": stage for number, stage in enumerate(plain["stages"], start=1)}
    return {key: value for key, value in plain.items() if key != "stages"} | stages


def _check_finished(out: Path) -> None:
    """Raise CheckpointError if a file of a finished OUT is damaged."""
    if (out / MANIFEST).is_file():
        read_manifest(out)
    else:
        check_finished(out)


@contextmanager
def _stages_folder(out: Path) -> Iterator[Path]:
    """OUT's folder for what stages but the last write, locked; both go again after an error, unless something is in them."""
    places, made = out / STAGES_FOLDER, not out.exists()
    lock = FolderLock(places)
    lock.acquire()
    try:
        yield places
    except BaseException as error:
        if made and isinstance(error, DamagedWeights):
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
    # Once OUT is made only the stages that end the recipe are left: its weights may be packed already.
    made, text = places / "made.yaml", as_yaml({**said, "stages": said["stages"][: recipe.final + 1]})
    finished = made.is_file() and made.read_text(encoding="utf-8") == text
    for number, step in enumerate(recipe.steps):
        place = places / f"{number + 1:02d}-{step.name}{'' if step.changes or step.name == 'pack' else '.json'}"
        if step.stage.ends:
            with recipe.telling(step):
                step.stage.run(out, place, step.options, step.more, progress)
            continue
        place = out if number == recipe.final else place
        options = step.options
        if step.name == "prune" and allocation is not None and options.allocation is None:
            options = replace(options, allocation=allocation)
        if model != recipe.model:
            options = replace(options, stands_for=recipe.model)
        if not (finished or (step.stage.to_file and read_sealed(place) is not None)):
            if step.stage.to_file:
                place.unlink(missing_ok=True)  # not what an earlier try wrote
            with recipe.telling(step):
                step.stage.run(model, place, options, step.more, progress)
        if step.stage.to_file:
            allocation = place
            continue
        if not (keep_stages or finished):
            _forget(places, place)
        model = str(place)
        if number == recipe.final:
            write_atomically(made, text)


def _forget(places: Path, but: Path) -> None:
    """Remove the results of earlier stages; the one whose result is finished needs them no more."""
    for path in places.iterdir():
        if path != but and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
