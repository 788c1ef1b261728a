"""Promises about the source itself: sizes, no environment variables, one version, and stubs that match the module."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dflash_cpp
from conftest import ROOT
from dflash_cpp import _core
from dflash_cpp.options import EngineKwargs, EngineOptions, GenerateKwargs, GenerateOptions, option_names

MAX_LINES = 650
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".inc", ".hip", ".cu", ".cuh", ".hpp", ".cc", ".c"}
FOLDERS = ("csrc", "python", "convert", "tests", "bench")
ENVIRONMENT = re.compile(r"\bgetenv\b|\bos\.environ\b|\bputenv\b|\bsetenv\b")


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and "build" not in path.parts:
                yield path


def test_files_stay_readable() -> None:
    long = {
        str(p.relative_to(ROOT)): n for p in sources(*FOLDERS) if (n := len(p.read_text().splitlines())) > MAX_LINES
    }
    assert not long


def test_race_checks_name_kernels_there_are() -> None:
    """compute-sanitizer takes a name that no kernel has, watches nothing and finds no error."""
    listed: list[str] = []
    for names in re.findall(r"for kernel in ((?:[^;]|\\\n)+); do", (ROOT / "tests/gpu/run_device.sh").read_text()):
        listed += names.replace("\\", " ").split()
    kernels = set()
    for path in sorted((ROOT / "csrc/backend/hip").iterdir()):
        kernels |= set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", path.read_text()))
    assert len(listed) > 20
    assert len(kernels) > 30
    assert not [name for name in listed if not any(name in kernel for kernel in kernels)]


def test_no_configuration_by_environment() -> None:
    # The tests give their subprocesses an environment; the program reads none.
    found = [
        str(p.relative_to(ROOT)) for p in sources("csrc", "python", "convert") if ENVIRONMENT.search(p.read_text())
    ]
    assert not found


def test_one_version() -> None:
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert project is not None
    assert changes is not None
    assert project[1] == changes[1] == _core.__version__ == dflash_cpp.__version__


def stub_names() -> dict[str, set[str]]:
    """Public names of the stub: of the module under "", of each class under its name."""
    tree = ast.parse((ROOT / "python" / "dflash_cpp" / "_core.pyi").read_text())
    out: dict[str, set[str]] = {"": set()}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            out[""].add(node.target.id)
        elif isinstance(node, ast.FunctionDef):
            out[""].add(node.name)
        elif isinstance(node, ast.ClassDef):
            out[""].add(node.name)
            members = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            members |= {
                n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            }
            out[node.name] = members
    return out


def public(names: list[str]) -> set[str]:
    return {n for n in names if not n.startswith("_")}


def test_the_stub_is_the_module() -> None:
    stub = stub_names()
    assert {n for n in stub[""] if not n.startswith("_")} == public(dir(_core))
    for name, members in stub.items():
        if name and not issubclass(getattr(_core, name), BaseException):
            assert public(list(members)) == public(dir(getattr(_core, name))), name


@pytest.mark.parametrize(("kwargs", "options"), [(EngineKwargs, EngineOptions), (GenerateKwargs, GenerateOptions)])
def test_keyword_types_list_every_option(kwargs: type, options: type) -> None:
    assert tuple(kwargs.__annotations__) == option_names(options)


def test_public_names_come_when_they_are_used() -> None:
    script = """
import sys, dflash_cpp
assert "dflash_cpp._core" not in sys.modules
assert dflash_cpp.errors.DFlashError is dflash_cpp.DFlashError
from dflash_cpp import *
assert issubclass(CapacityError, DFlashError) and Engine is dflash_cpp.Engine and generate is dflash_cpp.generate
assert set(dir(dflash_cpp)) == set(dflash_cpp.__all__)
assert not hasattr(dflash_cpp, "nothing")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_public_names_have_docstrings() -> None:
    names = set(dflash_cpp.__all__) - {"__version__", "CapacityError", "DFlashError"}
    assert not [name for name in sorted(names) if not getattr(dflash_cpp, name).__doc__]
