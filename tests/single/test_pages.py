"""What the pages name is there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "versions.env").exists())
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]
# Sources of others, and what a build makes.
ELSEWHERE = re.compile(
    r"xla/|jax/_src|jaxlib/|jax_plugins/|xla_plugins/|site-packages|out/|target/|mpi_cuda/lib/"
    r"|slurm/|_test\.py$|^buffer_callback\.py$|(pjrt_)?c_api\.h$|mpi(_proto|-ext)?\.h$"
)


def tracked() -> set[str]:
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    return set(names) | {str(folder) for name in names for folder in Path(name).parents}


TRACKED = tracked()


def spelled_out(path: str) -> Iterator[str]:
    """`a/{b,c}.rs` is two paths."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces is None:
        yield path
        return
    for choice in braces[1].split(","):
        yield from spelled_out(path[: braces.start()] + choice + path[braces.end() :])


def is_there(path: str) -> bool:
    """Pages name files from the folder that they speak of."""
    wanted = path.strip("/").removeprefix("../")
    return any(name == wanted or name.endswith("/" + wanted) for name in TRACKED)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    missing = []
    text = (ROOT / page).read_text()
    for quoted in re.findall(r"`([^`\n]+)`|\]\(([^)#\s]+)", text):
        name = quoted[0] or quoted[1]
        is_file = re.fullmatch(r"[\w./{},-]+\.(rs|py|h|c|md|env|toml|proto)|[\w./{},-]+/", name)
        if is_file is None or "://" in name or ELSEWHERE.search(name):
            continue
        missing += [path for path in spelled_out(name) if not is_there(path)]
    assert missing == []


SOURCES = [name for name in sorted(TRACKED) if name.endswith((".rs", ".py", ".h"))]


def test_files_that_comments_name_are_there() -> None:
    missing = []
    for source in SOURCES:
        for line in (ROOT / source).read_text().splitlines():
            comment = re.search(r"(//|#|\"\"\"|\* )(.*)", line)
            for name in re.findall(r"`([\w./]+\.(?:rs|py|md|h))`", comment[2] if comment else ""):
                if not ELSEWHERE.search(name) and not is_there(name):
                    missing.append((source, name))
    assert missing == []
