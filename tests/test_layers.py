"""The packages import downwards only, and the command line starts without the heavy ones."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "intarsia"
# From the top to the bottom.
LAYERS = [
    "cli",
    "ladder",
    "inference",
    "training",
    "tasks",
    "data",
    "integrations",
    "checkpoints",
    "model",
    "mixers",
    "layers",
    "ops",
    "jobs",
    "settings",
]
# The doors: to the top floor, and to what is called by the package's own name.
FILES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__main__.py", PACKAGE / "__init__.py"})


def imports(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction of an arrow"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith("intarsia."))


def test_every_package_has_its_place() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0]
    # What stands outside the layers (errors, files, extras) is below them all.
    allowed = LAYERS[LAYERS.index(layer) :] if layer in LAYERS else []
    for module in imports(path):
        target = module.split(".")[1]
        assert target not in LAYERS or target in allowed, f"{path.name} ({layer}) imports {module}"


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports for types alone and those inside of functions count too."""
    modules = {module_of(path): path for path in FILES}

    def target(name: str) -> str:
        return name if name in modules else name.rpartition(".")[0]

    graph = {
        module: sorted({target(name) for name in imports(path)} - {module})
        for module, path in modules.items()
    }
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for other in graph.get(module, ()):
                walk(other, (*way, module))
            done.add(module)

    for module in graph:
        walk(module, ())


BACKENDS = ("cpu", "torch", "chunked", "fla", "triton")


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.relative_to(PACKAGE).parts[0] in LAYERS[: LAYERS.index("ops")]],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_nothing_above_the_operators_knows_a_backend(path: Path) -> None:
    for module in imports(path):
        parts = module.split(".")
        if parts[1] == "ops" and len(parts) > 2:
            assert not parts[2].startswith("native"), f"{path.name} imports {module}"
            assert not parts[2].endswith(tuple(f"_{name}" for name in BACKENDS)), (
                f"{path.name} imports {module}"
            )
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "impl" and isinstance(node.value, ast.Constant):
            assert node.value.value in ("auto", "reference"), f"{path.name}: impl={node.value.value!r}"


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_the_command_line_starts_without_torch(argument: str) -> None:
    code = (
        "import sys; from intarsia.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'transformers'} & set(sys.modules); assert not heavy, heavy;"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["presets"], ["inspect", "kimi-linear-48b-a3b"]], ids=" ".join)
def test_models_are_listed_without_the_compiler(arguments: list[str]) -> None:
    code = (
        "import sys; from intarsia.cli import main; status = main(sys.argv[1:]);"
        "slow = {'torch._dynamo', 'torch._inductor', 'sympy', 'transformers', 'intarsia.training'} & set(sys.modules);"
        "assert not slow, slow; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
