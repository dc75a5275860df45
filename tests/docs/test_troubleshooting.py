"""docs/troubleshooting.md names every reason, warning and error that the code has."""

import ast
import re

import pytest

from fluxcompile import errors
from fluxcompile.passes.site import SkipReason
from tests.docs.blocks import FOLDER, ROOT

PAGE = FOLDER / "troubleshooting.md"


def plain(text: str) -> str:
    """Without line breaks and markup, so that a message may be set over lines."""
    return " ".join(re.sub(r"[`*]", "", text).split())


@pytest.fixture(scope="module")
def text():
    return plain(PAGE.read_text())


def rows(heading: str) -> list[str]:
    """First cells of the table below a heading."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)
    assert len(cells) == len(set(cells))
    return cells


def test_every_reason_has_its_row_and_no_row_is_of_the_past():
    assert set(rows("Why a layer was left alone")) == {reason.value for reason in SkipReason}


def test_every_error_has_its_row():
    known = {
        name: error
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, errors.FluxError)
    }
    del known["FluxError"]
    assert set(known) <= set(rows("Errors"))
    for name, error in known.items():
        line = next(x for x in PAGE.read_text().splitlines() if x.startswith(f"| `{name}`"))
        for base in (ValueError, RuntimeError):
            assert (f"`{base.__name__}`" in line) == issubclass(error, base)


def warned() -> dict[str, str]:
    """Where a FluxWarning is given -> the longest piece of its message that is fixed."""
    found = {}
    for tree in ("fluxcompile", "passes", "kernels"):
        for file in (ROOT / tree).rglob("*.py"):
            for function in ast.walk(ast.parse(file.read_text())):
                if isinstance(function, ast.FunctionDef):
                    found |= {
                        f"{file.relative_to(ROOT)}:{line}": piece
                        for line, piece in _messages(function)
                    }
    return found


def _messages(function: ast.FunctionDef):
    assigned = {
        target.id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "attr", "") == "not_trimmed":
            yield node.lineno, _fixed(node.value)
        if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "warn":
            continue
        if any(getattr(argument, "id", "") == "FluxWarning" for argument in node.args):
            message = node.args[0]
            yield node.lineno, _fixed(assigned.get(getattr(message, "id", ""), message))


def _fixed(message: ast.expr) -> str:
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    pieces = [part.value for part in parts if isinstance(part, ast.Constant)]
    return max(pieces, key=len, default="")


def test_every_warning_is_explained(text):
    """The longest fixed piece of the message stands there, or its first words."""
    found = warned()
    assert len(found) >= 9, "the code's warnings were not found"
    heads = {where: plain(piece)[:60].strip(".,;: ") for where, piece in found.items()}
    assert min(map(len, heads.values())) >= 10, heads
    assert [f"{where}: {head}" for where, head in heads.items() if head not in text] == []


def test_what_it_tells_to_do_is_there(text):
    from fluxcompile.cli import app

    commands = {info.name or info.callback.__name__ for info in app.registered_commands}
    assert set(re.findall(r"fluxcompile (doctor|explain|eval)\b", text)) <= commands
    assert {"doctor", "explain", "eval"} <= commands
