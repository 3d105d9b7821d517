"""Which source files a piece of code is made of, found by reading them and not by running them.

A module is read together with all that it imports, and all that those import, as far as they belong to it: modules of
its own package, and files that are nobody's installed library. Libraries are named and not read, since their version
says what they are.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import site
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from intarsia.errors import ConfigError

UNREADABLE = "unreadable"
"""In place of a hash, for a class that was typed into an interpreter."""
DIGITS = 16
"""Hex digits of a hash: enough to tell one version of a file from another."""


@dataclass
class Sources:
    """What was found: a hash for each module, and the names of the libraries that they import.

    The hash of Python source is that of its code: comments, docstrings and layout change no hash.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    libraries: set[str] = field(default_factory=set)


def sources_of(
    modules: Iterable[str] = (), classes: Iterable[type] = (), *, ignored: Collection[str] = ()
) -> Sources:
    """The sources of modules and of the modules that define classes (and the classes they inherit from).

    Args:
        ignored: modules that are neither hashed nor followed.

    Raises:
        ConfigError: a module that cannot be found.
    """
    modules, classes = list(modules), list(classes)
    named = [*modules, *(cls.__module__ for cls in classes)]
    walk = _Walk({module.partition(".")[0] for module in named}, frozenset(ignored))
    for module in modules:
        if find_source(module) is None:
            raise ConfigError(f"the source of the module {module!r} cannot be found")
        walk.visit(module)
    for cls in (base for given in classes for base in given.__mro__):
        if not walk.reads(cls.__module__):
            continue
        if find_source(cls.__module__) is not None:
            walk.visit(cls.__module__)
        else:
            walk.found.hashes[f"{cls.__module__}.{cls.__qualname__}"] = _hash_of_class(cls)
    return walk.found


def find_source(module: str) -> Path | None:
    """The file of a module, found without running it; None if there is none."""
    top, *rest = module.split(".")
    path, places = _top(top)
    for part in rest:
        path, below = None, []
        for place in places:
            candidates = [place / part / "__init__.py", place / f"{part}.py"]
            candidates += [place / f"{part}{suffix}" for suffix in EXTENSION_SUFFIXES]
            path = path or next((file for file in candidates if file.is_file()), None)
            if (place / part).is_dir():
                below.append(place / part)
        places = below
    return path


def _top(name: str) -> tuple[Path | None, list[Path]]:
    """The file of a module that is in no package, and where its submodules are."""
    try:
        spec = importlib.util.find_spec(name) if name else None
    except (ImportError, ValueError):  # ValueError: a module without a spec, as __main__
        spec = None
    if spec is not None:
        path = Path(spec.origin) if spec.has_location and spec.origin else None
        return path, [Path(place) for place in spec.submodule_search_locations or ()]
    file = getattr(sys.modules.get(name), "__file__", None)
    return (Path(file) if file and Path(file).is_file() else None), []


class _Walk:
    """The modules that were met so far. `own` are packages that are read wherever they are."""

    def __init__(self, own: set[str], ignored: frozenset[str]) -> None:
        self.found = Sources()
        self._ignored = ignored
        self._read_packages = dict.fromkeys(own - sys.stdlib_module_names, True)
        paths = sysconfig.get_paths()
        places = [paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()]
        self._library_places = [Path(place).resolve() for place in places]

    def reads(self, module: str) -> bool:
        """Whether a module is read: its package belongs to what was asked for, or is nobody's library."""
        top = module.partition(".")[0]
        if top not in self._read_packages:
            self._read_packages[top] = not (top in sys.stdlib_module_names or self._is_library(top))
        return self._read_packages[top]

    def _is_library(self, top: str) -> bool:
        path, places = _top(top)
        files = [file.resolve() for file in (places if path is None else [path])]
        return not files or any(
            file.is_relative_to(place) for file in files for place in self._library_places
        )

    def visit(self, module: str) -> None:
        """Take a module in, with all that it imports."""
        waiting = [module]
        while waiting:
            name = waiting.pop()
            if name in self._ignored or name in self.found.hashes:
                continue
            path = find_source(name) if self.reads(name) else None
            if path is None:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names:
                    self.found.libraries.add(top)
                continue
            source = _read(path)
            self.found.hashes[name] = source.hash
            waiting += [self._defining(imported, name, path) for imported in source.imports]

    def _defining(self, imported: _Import, importer: str, path: Path) -> str:
        """The module that defines what is imported, where packages only pass its name on."""
        for _ in range(16):  # a name that packages pass round in a circle does not work either
            module = _absolute(imported, importer, path)
            name = imported.name
            if name is None or name == "*" or not self.reads(module):
                return module
            if find_source(f"{module}.{name}") is not None:
                return f"{module}.{name}"
            found = find_source(module)
            if found is None or found.name != "__init__.py":
                return module
            passed = next((other for other in _read(found).imports if other.name == name), None)
            if passed is None:
                return module
            imported, importer, path = passed, module, found
        return module


@dataclass(frozen=True)
class _Import:
    """`from module import name` after `level` dots; without a name, `import module`."""

    module: str
    name: str | None
    level: int = 0


def _absolute(imported: _Import, importer: str, path: Path) -> str:
    """The module of an import without the dots that stand for the importer's package."""
    if not imported.level:
        return imported.module
    parts = importer.split(".")
    parts = parts[: len(parts) - imported.level + (path.name == "__init__.py")]
    return ".".join([*parts, *([imported.module] if imported.module else [])])


@dataclass(frozen=True)
class _Source:
    hash: str
    imports: tuple[_Import, ...]


def _read(path: Path) -> _Source:
    """The hash and the imports of a file. Read once for as long as it does not change."""
    stat = path.stat()
    return _read_version(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1024)
def _read_version(path: Path, changed: int, size: int) -> _Source:
    content = path.read_bytes()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):  # a compiled module, or data of thousands of terms
        return _Source(digest(content), ())
    imports = tuple(_imports(tree.body))
    try:
        return _Source(digest(_code(tree)), imports)
    except RecursionError:  # an expression too long to be written down again: the whole text counts
        return _Source(digest(content), imports)


def digest(content: bytes) -> str:
    """The hash of a file's content."""
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _code(tree: ast.Module) -> bytes:
    """The code without comments, docstrings and layout."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # A string that stands alone tells the reader something and does nothing.
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return ast.unparse(tree).encode()


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def _imports(body: Iterable[ast.AST]) -> Iterator[_Import]:
    """All imports, also those inside functions, but for those that only type checkers see."""
    # A list of what is still to be read, and no recursion: a sum of a thousand terms is nested a thousand deep.
    ahead = list(body)[::-1]
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.Import):
            yield from (_Import(alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (_Import(node.module or "", alias.name, node.level) for alias in node.names)
        elif isinstance(node, ast.If) and _asks_for_type_checking(node.test):
            ahead += node.orelse[::-1]
        else:
            ahead += list(ast.iter_child_nodes(node))[::-1]


def _asks_for_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _hash_of_class(cls: type) -> str:
    """The hash of a class that is in no file, as in a notebook."""
    try:
        return digest(_code(ast.parse(textwrap.dedent(inspect.getsource(cls)))))
    except (OSError, TypeError, SyntaxError, RecursionError):
        warnings.warn(
            f"the source of {cls.__qualname__} cannot be read: if it changes, nobody will notice; put it into a file",
            stacklevel=2,
        )
        return UNREADABLE
