"""What is in the tree is what gets installed."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.router_models import random_router

ROOT = Path(__file__).parents[1]
TREES = {
    "fluxcompile": "fluxcompile",
    "kernels": "fluxcompile.kernels",
    "passes": "fluxcompile.passes",
}


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_in_tree() -> set[str]:
    found = set()
    for folder, package in TREES.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    return found


def test_every_package_is_listed(pyproject):
    assert set(pyproject["tool"]["setuptools"]["packages"]) == packages_in_tree()


def test_every_folder_with_python_is_a_package():
    folders = {
        file.parent
        for tree in TREES
        for file in (ROOT / tree).rglob("*.py")
        if file.parent.is_dir()
    }
    assert [f for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_top_level_folders_are_mapped_into_the_package(pyproject):
    mapped = pyproject["tool"]["setuptools"]["package-dir"]
    assert mapped == {package: folder for folder, package in TREES.items()}


def test_wheel_holds_every_module_and_nothing_else(tmp_path):
    sources = copy_of_sources(tmp_path / "src")
    # Whatever routers there are; one at least.
    random_router().save_pretrained(tmp_path / "src" / "fluxcompile" / "routers" / "made-up")
    # --no-build-isolation: no index is asked, setuptools comes with the `test` extra.
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(tmp_path), sources],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("fluxcompile-*.whl")
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    expected = {
        "/".join([*package.split("."), *file.relative_to(ROOT / folder).parts])
        for folder, package in TREES.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    assert {n for n in names if n.endswith(".py")} == expected
    assert "fluxcompile/py.typed" in names
    routers = tmp_path / "src" / "fluxcompile" / "routers"
    packed = {name for name in names if name.startswith("fluxcompile/routers/")}
    assert packed == {
        f"fluxcompile/routers/{file.relative_to(routers)}" for file in routers.glob("*/*")
    }
    assert len(packed) >= 3
    for name in packed:
        assert archive.read(name) == (tmp_path / "src" / name).read_bytes()
    assert any(n.endswith("licenses/LICENSE") for n in names)


def copy_of_sources(target: Path) -> str:
    """The build's inputs alone, so that building leaves nothing in the working tree."""
    for folder in TREES:
        shutil.copytree(
            ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return str(target)


def test_backend_is_registered_by_entry_point_only():
    (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="flux")
    assert entry.value == "fluxcompile.backend:flux"
    # register_backend on top of the entry point breaks the look-up by name.
    sources = [f for tree in TREES for f in (ROOT / tree).rglob("*.py")]
    assert [f for f in sources if "register_backend(" in f.read_text()] == []


def test_bare_names_are_never_imported():
    bare = ("import passes", "import kernels", "from passes", "from kernels")
    sources = [f for tree in TREES for f in (ROOT / tree).rglob("*.py")]
    offenders = [
        f"{f.relative_to(ROOT)}: {line}"
        for f in sources
        for line in f.read_text().splitlines()
        if line.strip().startswith(bare)
    ]
    assert offenders == []
