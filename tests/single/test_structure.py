"""The shape of the code: what may import what, and how long a function or a line may be."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "versions.env").exists())
CRATES = [
    "mpi_runtime/src",
    "mpi_runtime/shim/src",
    "pjrt_plugin/src",
    "pjrt_plugin/hlo/src",
    "pjrt_plugin/xspace/src",
]
LONGEST_FUNCTION = 80
LONGEST_LINE = 100


def tracked(*patterns: str) -> list[Path]:
    names = subprocess.check_output(["git", "ls-files", "--", *patterns], cwd=ROOT, text=True)
    return [ROOT / name for name in names.split() if (ROOT / name).exists()]


# --- Rust ----------------------------------------------------------------------------------------

STRING_OR_COMMENT = re.compile(
    r"""//[^\n]*|/\*.*?\*/|b?r(?P<hashes>\#*)".*?"(?P=hashes)"""
    r"""|b?"(?:\\.|[^"\\])*"|b?'(?:\\.[^']*|[^'\\])'""",
    re.DOTALL,
)


TESTS = re.compile(r"#\[cfg\(test\)\]\s*(pub(\(\w+\))? )?mod \w+\s*(;|\{.*\Z)", re.DOTALL)


@cache
def code_of(file: Path) -> str:
    """The code of a file, with blanks for comments and texts, without its tests."""

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    return TESTS.sub("", STRING_OR_COMMENT.sub(blank, file.read_text()))


def module_of(file: Path, source: Path) -> tuple[str, ...]:
    parts = file.relative_to(source).with_suffix("").parts
    return parts[:-1] if parts[-1] in ("mod", "lib") else parts


def split_tree(tree: str) -> Iterator[str]:
    """The paths in the braces of a `use`, whole."""
    brace = tree.find("{")
    if brace < 0:
        yield tree.split(" as ")[0].strip()
        return
    depth, start, inner = 0, brace + 1, tree[: tree.rindex("}")]
    for place in range(brace + 1, len(inner) + 1):
        letter = inner[place] if place < len(inner) else ","
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            if piece := inner[start:place].strip():
                yield from split_tree(tree[:brace] + piece)
            start = place + 1


def paths_in(file: Path, module: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The paths that a file names, from the root of its crate."""
    code = code_of(file)
    children = set(re.findall(r"\bmod (\w+)\s*;", code))
    uses = re.findall(r"\buse ([^;]+);", code)
    inline = re.findall(r"(?<![\w:])((?:\w+::)+\w+)", re.sub(r"\buse [^;]+;", "", code))
    for tree in [path for use in uses for path in split_tree(" ".join(use.split()))] + inline:
        first, *rest = tree.replace(" ", "").split("::")
        base: tuple[str, ...]
        if first == "crate":
            base = ()
        elif first == "self":
            base = module
        elif first == "super":
            base = module[:-1]
            while rest and rest[0] == "super":
                base, rest = base[:-1], rest[1:]
        elif first in children:
            base, rest = module, [first, *rest]
        else:
            continue
        yield (*base, *rest)


@cache
def imports(crate: str) -> dict[str, frozenset[str]]:
    """For each file of a crate, the files that it imports."""
    source = ROOT / crate
    files = [
        file
        for file in tracked(f"{crate}/*.rs")
        if "tests" not in file.relative_to(source).parts and file.name != "tests.rs"
    ]
    by_module = {module_of(file, source): str(file.relative_to(source)) for file in files}
    arrows = {}
    for file in files:
        own, found = module_of(file, source), set()
        for path in paths_in(file, own):
            while path and path not in by_module:
                path = path[:-1]
            if path and path != own:
                found.add(by_module[path])
        arrows[by_module[own]] = frozenset(found)
    return arrows


def circles(arrows: dict[str, frozenset[str]]) -> list[set[str]]:
    """The sets of more than one node that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for target in arrows.get(left.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    left.append(target)
        return seen

    everywhere = {node: reached(node) for node in arrows}
    found: list[set[str]] = []
    for node in arrows:
        circle = {other for other in everywhere[node] if node in everywhere.get(other, ())}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


@pytest.mark.parametrize("crate", CRATES)
def test_no_circle_of_more_than_two_files(crate: str) -> None:
    assert [circle for circle in circles(imports(crate)) if len(circle) > 2] == []


@pytest.mark.parametrize("crate", CRATES)
def test_no_circle_of_folders(crate: str) -> None:
    """Also through files at the top of the crate."""

    def folder(file: str) -> str:
        return file.split("/")[0]

    arrows: dict[str, set[str]] = {}
    for file, targets in imports(crate).items():
        others = {folder(target) for target in targets} - {folder(file)}
        arrows.setdefault(folder(file), set()).update(others)
    found = circles({file: frozenset(targets) for file, targets in arrows.items()})
    folders = [{name for name in circle if not name.endswith(".rs")} for circle in found]
    assert [circle for circle in folders if len(circle) > 1] == []


def test_nothing_looks_up_to_the_top() -> None:
    top = {"api.rs", "exports.rs", "lib.rs"}
    lookers = {
        file: sorted(targets & top)
        for file, targets in imports("pjrt_plugin/src").items()
        if file not in top and targets & top
    }
    assert lookers == {}


def rust_functions(file: Path) -> Iterator[tuple[str, int]]:
    code = code_of(file)
    for found in re.finditer(r"\bfn (\w+)", code):
        end = re.compile(r"[{;]").search(code, found.end())
        if end is None or end[0] == ";":
            continue
        depth, place = 0, end.start()
        while True:
            depth += (code[place] == "{") - (code[place] == "}")
            place += 1
            if depth == 0:
                break
        yield found[1], code.count("\n", found.start(), place) + 1


def test_no_function_of_rust_is_long() -> None:
    files = [f for f in tracked("*.rs") if "tests" not in f.parts and f.name != "tests.rs"]
    long = [
        (str(file.relative_to(ROOT)), name, lines)
        for file in files
        for name, lines in rust_functions(file)
        if lines > LONGEST_FUNCTION
    ]
    assert long == []


# --- Python --------------------------------------------------------------------------------------


def python_imports() -> dict[str, frozenset[str]]:
    source = ROOT / "python"
    files = tracked("python/*.py")
    names = {}
    for file in files:
        parts = file.relative_to(source).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    arrows = {}
    for name, file in names.items():
        # What a function imports, it imports when it runs: only the top of a module counts.
        found = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (inner & names.keys()) or {node.module}
        arrows[name] = frozenset((found & names.keys()) - {name})
    return arrows


def test_no_circle_of_python_modules() -> None:
    assert circles(python_imports()) == []


def test_no_function_of_python_is_long() -> None:
    long = [
        (str(file.relative_to(ROOT)), node.name)
        for file in tracked("python/*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    ]
    assert long == []


# --- Everything ----------------------------------------------------------------------------------


def test_no_line_is_long() -> None:
    """Code and prose alike; the rows of a table in Markdown and addresses may be longer."""
    long = []
    for file in tracked("*.rs", "*.py", "*.md", "*.h", "*.sh", "*.toml", "scripts/*"):
        # C code of the simulator, whose lines are instructions.
        if "simulator" in file.parts:
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if len(line) > LONGEST_LINE and not line.lstrip().startswith("|") and "://" not in line:
                long.append(f"{file.relative_to(ROOT)}:{number}")
    assert long == []
