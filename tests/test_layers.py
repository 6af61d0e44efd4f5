"""The import direction: a module imports only from floors below its own, or from those above it in its own list."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "topiarist"
FLOORS = [
    ["__about__"],
    ["core", "quantization", "checkpoints", "data", "models"],
    ["solvers", "allocate", "masklearn", "structured", "masks", "runtime", "evaluation", "results"],
    ["pipelines"],
    ["cli", "__main__", "__init__"],
]
MAY_USE = {"evaluation": {"masks"}, "masks": {"masklearn", "results"}, "runtime": {"results"}}
NEEDS_NO_MODEL = {"solvers", "masklearn"}


ROOMS_OF_PIPELINES = [
    {"common", "training"},
    {"pruning", "allocating"},
    {"learning", "quantizing", "exporting"},
    {"recovering", "shrinking"},
    {"recipes"},
]
"""Inside `pipelines/`: a room imports from its own floor and from those below. A search prunes, and a run by rule searches."""


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """The syntax tree of a file, node by node."""
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports_of(path: Path) -> set[str]:
    """Modules (dotted, below topiarist) and foreign packages that a file imports, inside functions too."""
    names: set[str] = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{a.name}" if node.module == "topiarist" else node.module for a in node.names)
    return names


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def test_every_module_has_a_floor():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")}
    assert rooms <= {room for floor in FLOORS for room in floor}


def test_imports_only_go_down():
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        for name in imports_of(path):
            if not name.startswith("topiarist."):
                continue
            other = name.split(".")[1]
            if other == room or room in FLOORS[-1]:
                continue
            earlier = floor_of(other) == floor_of(room) == 1 and FLOORS[1].index(other) < FLOORS[1].index(room)
            allowed = floor_of(other) < floor_of(room) or earlier or other in MAY_USE.get(room, set())
            assert allowed, f"{path.relative_to(PACKAGE)} imports {name}"


def test_imports_inside_the_pipelines_only_go_down():
    floors = {room: floor for floor, rooms in enumerate(ROOMS_OF_PIPELINES) for room in rooms}
    for path in (PACKAGE / "pipelines").rglob("*/*.py"):
        for name in imports_of(path):
            if name.startswith("topiarist.pipelines."):
                assert floors[name.split(".")[2]] <= floors[path.parent.name], (
                    f"{path.relative_to(PACKAGE)} imports {name}"
                )


def test_methods_know_no_models():
    for path in PACKAGE.rglob("*.py"):
        if room_of(path) in NEEDS_NO_MODEL:
            foreign = {name.split(".")[0] for name in imports_of(path)}
            used = {name.split(".")[1] for name in imports_of(path) if name.startswith("topiarist.")}
            assert "transformers" not in foreign, path
            assert not used & ({"models"} | (NEEDS_NO_MODEL - {room_of(path)})), path


def test_only_the_command_line_prints():
    for path in PACKAGE.rglob("*.py"):
        if not room_of(path).startswith("cli"):
            calls = (node for node in nodes_of(path) if isinstance(node, ast.Call))
            names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
            assert "print" not in names, path


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Functions of a module or class, and methods of its classes, whose names do not begin with an underscore."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
            yield from [node] if isinstance(node, ast.FunctionDef) else public_functions(node.body)


def test_tensor_parameters_say_their_shape():
    """Of public functions; `Mapping[str, Tensor]` holds many shapes. What is copied beside a model needs torch alone."""
    for path in PACKAGE.rglob("*.py"):
        module = next(node for node in nodes_of(path) if isinstance(node, ast.Module))
        for function in public_functions(module.body) if path.name != "modeling_pruned.py" else ():
            given = function.args
            for argument in filter(None, (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg)):
                words = ast.unparse(argument.annotation).split(" | ") if argument.annotation else []
                where = f"{path.relative_to(PACKAGE)}:{function.lineno} {argument.arg}"
                assert not {"Tensor", "torch.Tensor"} & {*words}, where
