"""A recipe: a model, text, and the stages that make a result of them, checked as a whole before any work.

topiarist: 1
model: org/name
out: small-and-sparse
data: [text.jsonl]
stages:
- prune: {method: alps, pattern: 0.5}
- recover: {tokens: 300k}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from topiarist.checkpoints.access import check_name
from topiarist.checkpoints.reading import Checkpoint, locate
from topiarist.checkpoints.writing import check_place
from topiarist.core.errors import CalibrationError, PatternError, TopiaristError
from topiarist.core.grammar import OptionError
from topiarist.core.options import ALIASES, changed, shown
from topiarist.data import TextFiles
from topiarist.data.compressed import kind_of
from topiarist.data.draw import SMALL
from topiarist.pipelines.common.reproduce import RECIPE_VERSION
from topiarist.pipelines.recipes.reading import parse, read_text
from topiarist.pipelines.recipes.stages import QUANTISED, STAGES, Stage, state_of
from topiarist.pipelines.recovering.inputs import check_scales_learn

KEYS = ("topiarist", "model", "out", "data", "stages")
DATA = ("data", *(word for word, meant in ALIASES.items() if meant == "data"))
"""The words for the text of a stage."""
SHARES = (128, 128)
"""A shape in which densities are compared, to a hundredth."""


@dataclass(frozen=True)
class Step:
    """One stage of a recipe."""

    name: str
    options: Any
    more: Mapping[str, Any]
    line: int
    """Of the file."""

    @property
    def stage(self) -> Stage:
        """Its kind."""
        return STAGES[self.name]

    @property
    def changes(self) -> bool:
        """Whether it makes another model of the one that it gets."""
        return not (self.stage.to_file or self.stage.ends)


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says."""

    source: str
    """The file, for messages."""
    plain: Mapping[str, Any]
    steps: tuple[Step, ...]

    @property
    def model(self) -> str:
        """The model that it starts from."""
        return str(self.plain.get("model") or "")

    @property
    def out(self) -> str:
        """The folder of the result."""
        return str(self.plain.get("out") or "")

    @property
    def final(self) -> int:
        """Number of the last stage that makes another model: its result is OUT."""
        return max(number for number, step in enumerate(self.steps) if step.changes)

    def check_whole(self) -> None:
        """Raise what can be known before any work: no model or OUT named, a wrong place, a stage that does not fit."""
        if not self.model or not self.out:
            missing = "model" if not self.model else "out"
            raise OptionError(f"{self.source} names no {missing}: write it there, or give --{missing}")
        check_place(Path(self.out))
        model = Checkpoint(locate(self.model))
        self.check(state_of(model.config))
        self._check_teachers(pruned=bool(model.claims()))
        self._check_held_out()

    def _check_held_out(self) -> None:
        """Raise OptionError for an eval on a file that a stage before it reads whole: it would be refused at the end."""
        read: dict[tuple[Path, str], str] = {}
        for step in self.steps:
            data, measured = getattr(step.options, "data", None), getattr(step.options, "text", ())
            if step.changes and isinstance(data, TextFiles):
                read |= {(path.resolve(), data.field): step.name for path in data.paths if _is_read_whole(path)}
            for path in map(Path, measured):
                if name := read.get((path.resolve(), step.options.text_field)):
                    raise OptionError(
                        f"{self.source} line {step.line}: eval measures on {path}, which is the text of {name}: the result "
                        "would flatter it; name other text"
                    )

    def check(self, state: str) -> None:
        """Raise OptionError, with its line, for a stage that does not fit what the model is when it begins."""
        for step in self.steps:
            if state not in step.stage.takes:
                takes = " or ".join(step.stage.takes)
                raise OptionError(
                    f"{self.source} line {step.line}: {step.name} takes a model that is {takes}, and it is {state} there"
                )
            if step.name == "recover" and state == QUANTISED:
                with self.telling(step):
                    check_scales_learn("the model", step.options)
            state = step.stage.gives(state, step.options)
        changing = [number for number, step in enumerate(self.steps) if step.changes]
        for number, step in enumerate(self.steps):
            if step.stage.ends and changing and number < changing[-1]:
                raise OptionError(
                    f"{self.source} line {step.line}: {step.name} ends a recipe: put it after all stages that change the model"
                )
            if (
                step.name == "pack"
                and step.options.rounds
                and "eval" in (earlier.name for earlier in self.steps[:number])
            ):
                raise OptionError(
                    f"{self.source} line {step.line}: pack rounds the weights that eval has measured: leave values and head "
                    "out, or leave eval out and measure what `topiarist unpack` makes of OUT"
                )
        if not changing or self.steps[-1].stage.to_file:
            raise OptionError(f"{self.source} line {self.steps[-1].line}: the last stage must write a model")
        for step, follower in itertools.pairwise(self.steps):
            if not step.stage.to_file:
                continue
            if follower.name != "prune" or follower.options.allocation is not None:
                raise OptionError(
                    f"{self.source} line {follower.line}: {follower.name} does not read what {step.name} before it finds: put "
                    "a prune without an allocation of its own right behind it"
                )
            asked, found = follower.options.pattern, step.options.base_pattern
            if asked is not None and abs(asked.sparsity_of(SHARES) - found.sparsity_of(SHARES)) > 0.01:
                raise OptionError(
                    f"{self.source} line {follower.line}: {follower.name} asks for {asked}, {step.name} before it "
                    f"allocates for {found}: leave the pattern of {follower.name} out"
                )

    def _check_teachers(self, *, pruned: bool) -> None:
        """Raise OptionError for a teacher that is not there or not asked, and for a recovery that would learn from what the
        recipe starts from, if that is pruned itself.
        """
        changed = False
        for step in self.steps:
            if teacher := step.more.get("teacher"):
                try:
                    step.options.check_asked(teacher)
                    locate(teacher)
                except TopiaristError as error:
                    raise OptionError(f"{self.source} line {step.line}: {error}") from error
            if pruned and changed and step.name == "recover" and step.options.needs_teacher and not step.more:
                raise OptionError(
                    f"{self.source} line {step.line}: recover learns from the model that the recipe starts from, and "
                    f"{self.model} is pruned itself: name the dense model as its teacher"
                )
            changed |= step.changes

    @contextmanager
    def telling(self, step: Step) -> Iterator[None]:
        """Give errors of settings that only the model or the text could tell the stage's line."""
        try:
            yield
        except (OptionError, PatternError, CalibrationError) as error:
            error.args = (f"{self.source} line {step.line}: {error}",)
            raise


def shipped() -> dict[str, str]:
    """The recipes that come with topiarist: name -> text."""
    folder = files("topiarist") / "recipes"
    return {
        path.name.removesuffix(".yaml"): path.read_text(encoding="utf-8")
        for path in sorted(folder.iterdir(), key=lambda path: path.name)
        if path.name.endswith(".yaml")
    }


def read_recipe(
    source: str | Path,
    *,
    model: str | None = None,
    out: str | Path | None = None,
    data: Sequence[str | Path] | None = None,
) -> Recipe:
    """Read a recipe from a file, or one that is shipped by its name.

    model, out, data: in place of what it says. Raises OptionError, with the line of the file, for everything that is wrong in
    it, and TopiaristError if there is no such recipe.
    """
    path, known = Path(source), shipped()
    check_name(path)
    if path.is_file():
        text = read_text(path)
    elif str(source) in known:
        text = known[str(source)]
    else:
        raise TopiaristError(f"recipe {source} is neither a file nor one of {', '.join(known)}")
    plain, tree = parse(text, str(source))
    given = {"model": model, "out": None if out is None else str(out), "data": [str(path) for path in data or ()]}
    return _parsed(str(source), plain, tree, {key: value for key, value in given.items() if value})


def _parsed(source: str, plain: Any, tree: Any, given: Mapping[str, Any]) -> Recipe:
    if not isinstance(plain, dict):
        raise OptionError(f"{source} holds no recipe: it needs the keys {', '.join(KEYS)}")
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in tree.value}
    for key in plain:
        if key not in KEYS:
            raise OptionError(
                f"{source} line {lines.get(str(key), 1)}: unknown key {key!r}; a recipe has {', '.join(KEYS)}"
            )
    if plain.get("topiarist") != RECIPE_VERSION:
        if "topiarist" not in plain:
            raise OptionError(f"{source} line 1: no version; a recipe begins with the line topiarist: {RECIPE_VERSION}")
        raise OptionError(
            f"{source} line {lines['topiarist']}: recipe version {shown(plain['topiarist'])}; this topiarist reads "
            f"version {RECIPE_VERSION}"
        )
    for key in ("model", "out"):
        if not isinstance(plain.get(key), str | int | float | None):
            raise OptionError(f"{source} line {lines[key]}: {key} is one text, not several")
    _paths(f"{source} line {lines.get('data', 1)}", plain.get("data"))
    stages = plain.get("stages")
    if not isinstance(stages, list) or not stages:
        raise OptionError(f"{source} line {lines.get('stages', 1)}: stages must be a list of at least one stage")
    if "data" in given:  # it stands above what single stages say, and OUT's recipe names what was read
        stages = [_without_data(entry) for entry in stages]
    whole = {**plain, **given, "stages": stages}
    nodes = next(value for key, value in tree.value if key.value == "stages").value
    steps = [_step(source, entry, node, whole) for entry, node in zip(stages, nodes, strict=True)]
    return Recipe(source, whole, tuple(steps))


def _step(source: str, entry: Any, node: Any, whole: Mapping[str, Any]) -> Step:
    line = node.start_mark.line + 1
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise OptionError(
            f"{source} line {line}: a stage is its name with its settings, such as `prune: {{method: alps}}`"
        )
    (name, settings), *_ = entry.items()
    if name not in STAGES:
        raise OptionError(f"{source} line {line}: unknown stage {name!r}; stages are {', '.join(STAGES)}")
    if not isinstance(settings, dict | None) or not all(isinstance(field, str) for field in settings or ()):
        raise OptionError(f"{source} line {line}: the settings of {name} are {shown(settings)}; write field: value")
    stage, settings = STAGES[name], dict(settings or {})
    places = {} if isinstance(node.value, str) else _lines(node.value[0][1])
    more = {key: named for key in stage.more if (named := settings.pop(key, None)) is not None}
    for key, named in more.items():
        if not isinstance(named, str) or not named:
            raise OptionError(f"{source} line {places.get(key, line)}: {key} is {shown(named)}; name one model")
    if _reads_text(stage):
        said = next((settings.pop(word) for word in DATA if word in settings), whole.get("data"))
        if said is not None:
            settings["data"] = _paths(f"{source} line {places.get('data', line)}", said)
    try:
        return Step(name, stage.options(**settings), more, line)
    except TopiaristError as error:
        named = (place for field, place in places.items() if f" {field} " in f" {error} " or f"{field!r}" in str(error))
        at = next(named, line)
        raise OptionError(f"{source} line {at}: {error}") from error


def _reads_text(stage: Stage) -> bool:
    return "data" in (field.name for field in fields(stage.options))


def _without_data(entry: Any) -> Any:
    """A stage without text of its own; what is no stage as it is, to be refused."""
    if not isinstance(entry, dict):
        return entry
    return {
        name: {key: value for key, value in settings.items() if key not in DATA}
        if isinstance(settings, dict) and name in STAGES and _reads_text(STAGES[name])
        else settings
        for name, settings in entry.items()
    }


def _paths(where: str, said: Any) -> list[Path]:
    """Files that a recipe names. where: for the message. Raises OptionError for what is no text or list of texts."""
    listed = said if isinstance(said, list | tuple) else [] if said is None else [said]
    if not all(isinstance(path, str) for path in listed):
        raise OptionError(f"{where}: data is {shown(said)}; name a file, or a list of files")
    return [Path(path) for path in listed]


def _is_read_whole(path: Path) -> bool:
    """Whether a file is so short that all of it is known to the result, and so long that it would be seen."""
    return path.is_file() and not kind_of(path)[1] and 1 << 12 <= path.stat().st_size <= SMALL


def _lines(node: Any) -> dict[str, int]:
    """Line of every key of a mapping."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {str(key.value): key.start_mark.line + 1 for key, _ in pairs}


def settings_from(source: str | Path, name: str) -> dict[str, Any]:
    """Settings of the one stage of a recipe, for the command `name`: those that are not at their defaults.

    Raises OptionError for a recipe of other or more stages, and what `read_recipe` raises.
    """
    steps = read_recipe(source).steps
    if [step.name for step in steps] != [name]:
        raise OptionError(
            f"{source} has the stages {', '.join(step.name for step in steps)}: --recipe of this command takes one stage, "
            f"{name}; `topiarist run` runs any"
        )
    return changed(steps[0].options)
