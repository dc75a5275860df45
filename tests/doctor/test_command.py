"""``fluxcompile doctor`` as a user runs it."""

import json
import socket

import pytest
from typer.testing import CliRunner

from fluxcompile.cli import app
from fluxcompile.doctor import checks, command, examine, gpu, self_test
from fluxcompile.doctor.finding import fail, ok, warn

NAMES = [
    *("fluxcompile", "python", "torch", "transformers", "triton", "compiler", "gpu"),
    *("inductor cache", "triton cache", "backend", "self-test, full", "self-test, sparse"),
]


def run(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture
def quick(monkeypatch):
    """A self-test that is said to pass."""
    monkeypatch.setattr(self_test, "self_test", lambda routes, how: ok(f"self-test, {routes}", how))


def test_this_machine_works(monkeypatch):
    """Without a network."""

    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    result = run("--lowering", "eager")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if not line.lstrip().startswith("→")]
    assert len(lines) == len(NAMES) + 1
    for name, line in zip(NAMES, lines, strict=False):
        assert line[6:].startswith(name)
    assert lines[-1].startswith(("all is well", "works;"))


def test_json(quick):
    result = run("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["ok"] is True
    assert [check["name"] for check in report["checks"]] == NAMES
    assert all(set(check) == {"name", "status", "found", "advice"} for check in report["checks"])


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_a_failed_line_fails_the_command(quick, monkeypatch, option):
    monkeypatch.setattr(gpu, "gpu", lambda: fail("gpu", "broken", "mend it"))
    result = run(*option)
    assert result.exit_code == 1
    assert "broken" in result.output
    assert "mend it" in result.output
    if option:
        assert json.loads(result.output)["ok"] is False
    else:
        assert f"1 of {len(NAMES)} checks failed" in result.output


def test_a_warning_does_not(quick, monkeypatch):
    monkeypatch.setattr(gpu, "gpu", lambda: warn("gpu", "old", "buy a new one"))
    result = run()
    assert result.exit_code == 0
    assert "→ buy a new one" in result.output
    assert "could be better" in result.output


@pytest.mark.parametrize(("has", "lowering"), [(True, "inductor"), (False, "eager")])
def test_the_self_test_compiles_where_it_can(quick, monkeypatch, has, lowering):
    monkeypatch.setattr(checks.toolchain, "has_compiler", lambda: has)
    findings = list(examine())
    assert [finding.found for finding in findings[-2:]] == [lowering] * 2


def test_lines_come_as_they_are_found(monkeypatch, capsys):
    """A check that hangs, or ends the process, leaves the lines before it on the screen."""

    def two(_):
        yield ok("first", "well")
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "examine", two)
    with pytest.raises(KeyboardInterrupt):
        command.run_doctor()
    assert "first" in capsys.readouterr().out
