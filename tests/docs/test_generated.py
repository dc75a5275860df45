"""What docs/ has from the code is what the code says now."""

import importlib
import re
import sys

import pytest

from fluxcompile.options import CompileOptions
from tests.docs.blocks import FOLDER

SCRIPTS = ("docstrings", "generate", "option_tables", "rewrite_picture")


@pytest.fixture
def script(monkeypatch):
    """Imports one of the folder's scripts, whose names are anybody's afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def test_the_options_reference_is_up_to_date(script):
    page = script("option_tables").options_page()
    assert (FOLDER / "options.md").read_text() == page, "run python docs/generate.py"


def test_every_option_and_command_is_in_it():
    text = (FOLDER / "options.md").read_text()
    for name in CompileOptions.__dataclass_fields__:
        assert f"| `{name}` |" in text
    commands = re.findall(r"^### `fluxcompile (\w+)`$", text, re.MULTILINE)
    assert commands == ["convert", "demo", "doctor", "eval", "explain", "retarget", "train"]
    assert "| `--json` |" in text
    assert not re.findall(r"\|\s*\|$", text, re.MULTILINE), "an option without a meaning"


def test_check_fails_on_a_page_that_is_out_of_date(script, monkeypatch, tmp_path, capsys):
    generate = script("generate")
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    monkeypatch.setattr(generate, "PAGES", {"one.md": lambda: "new", "two.md": lambda: "same"})
    (tmp_path / "one.md").write_text("old")
    (tmp_path / "two.md").write_text("same")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1
    assert "one.md: out of date" in capsys.readouterr().out
    assert (tmp_path / "one.md").read_text() == "old"
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main() == 0
    assert (tmp_path / "one.md").read_text() == "new"
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 0


def test_docstrings_that_say_nothing_are_refused(script):
    def function(known, unknown):
        """One.

        Args:
            known: this one, see
                :class:`fluxcompile.FluxConfig` and ``a | b``.
        """

    tables = script("option_tables")
    with pytest.raises(ValueError, match=r"function\(unknown\): expected a line"):
        tables._arguments(function)
    with pytest.raises(ValueError, match="expected a section 'Attributes'"):
        script("docstrings").described(function, "Attributes")
    entries = script("docstrings").described(function, "Args")
    assert entries == {"known": "this one, see `FluxConfig` and `a \\| b`."}


def test_the_picture_shows_what_the_passes_do(script):
    """Versions of torch and transformers trace differently: what is put in is what counts."""
    made = script("rewrite_picture").rewrite_picture()
    committed = (FOLDER / "rewrite.svg").read_text()
    ours = set(re.findall(r"flux\.\w+", made))
    assert ours == {
        *("flux.route_rows", "flux.mask_bounds", "flux.full_attention"),
        "flux.streaming_attention",
    }
    assert ours == set(re.findall(r"flux\.\w+", committed))
    for text in (made, committed):
        out, put_in = text.split("put in:")
        assert "scaled_dot_product_attention" in out
        assert "scaled_dot_product_attention" not in put_in
        assert f"[1, 1, {40}, {40}]" in out, "the mask"
        assert "cond(" in put_in
