"""docs/sparse-modes.md, done as it says: the files written, the lines changed, the code run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, blocks_of

PAGE = "sparse-modes.md"
TREES = {
    "fluxcompile": "fluxcompile",
    "passes": "fluxcompile/passes",
    "kernels": "fluxcompile/kernels",
}


def place(tree: Path, title: str) -> Path:
    """Where a file of the repository is in a copy that can be imported."""
    folder, _, rest = title.partition("/")
    return tree / TREES[folder] / rest if folder in TREES else tree / title


def apply(tree: Path, block: Block) -> None:
    """A diff block: what it keeps and removes must be there, once."""
    lines = block.text.splitlines()
    assert all(line[:1] in (" ", "+", "-") for line in lines)
    old = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
    new = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
    file = place(tree, block.title)
    text = file.read_text()
    assert text.count(old) == 1, f"{PAGE}:{block.line}: {block.title} has no longer these lines"
    file.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources with the mode that the page adds."""
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "routers")
    for source, target in TREES.items():
        shutil.copytree(ROOT / source, tree / target, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tree)
    for block in blocks_of(PAGE):
        if block.language == "diff":
            apply(tree, block)
        elif block.title:
            file = place(tree, block.title)
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.text)
    return tree


def run(tree: Path, code: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env=environment | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )


def page_code() -> str:
    """The page's Python that is no file, and then a look at which copy ran."""
    code = [
        block.text for block in blocks_of(PAGE) if block.language == "python" and not block.title
    ]
    assert len(code) == 2
    return "\n".join([*code, "print(fluxcompile.__file__, fluxcompile.kernels.__file__)"])


def test_the_page_works(tree):
    done = run(tree, page_code())
    assert done.returncode == 0, done.stderr
    table, where = done.stdout.rsplit("\n", 2)[0], done.stdout.splitlines()[-1]
    assert table.count(" even ") == 2, table
    assert where.count(str(tree)) == 2, "another installation ran"


@pytest.mark.slow
def test_a_wrong_pattern_does_not_pass(tree, tmp_path):
    """The page's own test sees it: a mode that reads every third block is not ``even``."""
    broken = tmp_path / "tree"
    shutil.copytree(tree, broken, ignore=shutil.ignore_patterns("__pycache__"))
    op = place(broken, "kernels/even/op.py")
    assert "d % 2 == 0" in op.read_text()
    op.write_text(op.read_text().replace("d % 2 == 0", "d % 3 == 0"))
    done = run(broken, page_code())
    assert done.returncode != 0
    assert "AssertionError" in done.stderr
    assert "Tensor-likes are not close" in done.stderr


def test_files_the_page_points_to_are_there():
    text = (ROOT / "docs" / PAGE).read_text()
    for path in (
        *("kernels/power/reference.py", "kernels/streaming", "kernels/power"),
        *("tests/kernels/sparse_cases.py", "tests/passes/test_sparse_modes.py"),
    ):
        assert f"`{path}`" in text
        assert (ROOT / path).exists()
