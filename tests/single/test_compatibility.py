"""The package uses of JAX's internals what `docs/compatibility.md` says, and nothing else."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

import mpi_cuda
from mpi_cuda import _jax_patches
from mpi_cuda._jax_patches.patch import Patch

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "docs/compatibility.md").is_file())
PACKAGE = Path(mpi_cuda.__file__).parent
PATCHES = PACKAGE / "_jax_patches"
FILES = sorted({*PATCHES.glob("*.py")} - {PATCHES / "__init__.py", PATCHES / "patch.py"})
OTHERS = sorted({*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("mpi_cuda_*.py")} - set(FILES))
# Attributes that begin with an underscore and are neither JAX's nor ours.
FOREIGN = {
    "_addressof": "mpi4py documents it",
    "_handleof": "mpi4py documents it",
    "_sizeof": "mpi4py documents it",
    "_current_frames": "Python documents it",
    "_exit": "Python documents it",
    "_replace": "Python documents it, of named tuples",
    "_getframe": "Python documents it",
    "_cuda_mpi_setup_done": "mpi4jax's (`docs/compatibility.md`)",
}
# Files that name the distribution `jaxlib`, whose version they ask for.
NAMES_JAXLIB = ["software.py"]


def declared(file: Path) -> tuple[Patch, ...]:
    return importlib.import_module(f"mpi_cuda._jax_patches.{file.stem}").PATCHES


def table() -> list[str]:
    """The rows below the heading, without the table's own two."""
    text = (ROOT / "docs/compatibility.md").read_text()
    section = text.split("## What of JAX's internals is used", 1)[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def row(file: Path, patch: Patch) -> str:
    used = ", ".join(f"`{name}`" for name in patch.used)
    return f"| `{file.name}` | {patch.what} | {used} | {patch.without} | `{patch.test}` |"


def is_private(module: str) -> bool:
    """Whether a dotted name is of JAX, and not of its public part."""
    top, *parts = module.split(".")
    return top == "jaxlib" or (top == "jax" and any(part.startswith("_") for part in parts))


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The name that an import binds, and what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.asname or name.name.split(".")[0], name.name
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                yield name.asname or name.name, f"{node.module}.{name.name}"


def test_the_table_has_what_the_files_declare() -> None:
    rows = [row(file, patch) for file in FILES for patch in declared(file)]
    assert [line for line in table() if not line.startswith("| `pjrt_plugin/")] == rows


def test_the_tests_that_the_table_names_exist() -> None:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")]
    functions = {
        node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)
    }
    for line in table():
        names = re.findall("`(.*?)`", line.split("|")[-2])
        assert names and functions.issuperset(names), line


def test_every_file_is_in_one_list() -> None:
    listed = [*sum(_jax_patches.INSTALLED.values(), ()), *_jax_patches.CALLED]
    assert sorted(listed) == [file.stem for file in FILES]
    for file in FILES:
        module = importlib.import_module(f"mpi_cuda._jax_patches.{file.stem}")
        assert hasattr(module, "install") == (file.stem not in _jax_patches.CALLED)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_private_name_is_declared(file: Path) -> None:
    tree = ast.parse(file.read_text())
    modules = {name: module for name, module in imports(tree) if is_private(module)}
    used = {
        f"{modules[node.value.id].removeprefix('jax._src.')}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in modules
    }
    known = [name for patch in declared(file) for name in patch.used]
    missing = [name for name in used if not any(f"{k}.".startswith(f"{name}.") for k in known)]
    assert not missing
    assert list(declared(file)) and all(patch.used for patch in declared(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_this_jax_has_every_name(file: Path) -> None:
    for name in (name for patch in declared(file) for name in patch.used):
        find(name if name.startswith("jaxlib.") else f"jax._src.{name}")


def find(name: str) -> None:
    """Fails where a name is not in a module, nor an attribute that a class announces."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        *inside, last = parts[count:]
        owner = reduce(getattr, inside, found)
        assert hasattr(owner, last) or last in getattr(owner, "__annotations__", {}), name
        return
    raise AssertionError(name)


@pytest.mark.parametrize("file", OTHERS, ids=lambda file: str(file.relative_to(PACKAGE.parent)))
def test_no_other_file_touches_what_is_private_to_jax(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert not [module for _, module in imports(tree) if is_private(module)]
    # Names of its own: of functions, classes, and of what is assigned to.
    own = set(FOREIGN)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "self" and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr):
            assert node.attr in own, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # For `import_module`, `getattr` and the like.
            if node.value == "jaxlib" and file.name in NAMES_JAXLIB:
                continue
            assert not re.fullmatch(r"[\w.]+", node.value) or not is_private(node.value), node.value


def test_modules_import_each_other_one_way() -> None:
    graph: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        graph[".".join(parts).removesuffix(".__init__")] = set()
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        for _, module in imports(ast.parse(file.read_text())):
            found = module if module in graph else module.rpartition(".")[0]
            # Python itself imports the package before what is in it.
            if found in graph and not f"{name}.".startswith(f"{found}."):
                graph[name].add(found)
    assert list(graphlib.TopologicalSorter(graph).static_order())
