"""The options reference: every table of it comes from the code."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, get_args, get_type_hints

from typer.models import ArgumentInfo

import fluxcompile
from docstrings import described, markdown
from fluxcompile.cli import app
from fluxcompile.options import CompileOptions
from fluxcompile.training import RouterTrainingArguments
from fluxcompile.training.compiled_arguments import CompiledTrainingArguments

NOTE = "<!-- Written by `python docs/generate.py` from the code: change that, not this page. -->"

BACKEND = (
    'What `torch.compile(model, backend="flux", options={...})` takes, and what '
    "`fluxcompile.compile` takes by name. `inductor_mode` is `torch.compile`'s own `mode`."
)


def options_page() -> str:
    """The whole page, as Markdown."""
    sections = [
        "# Options",
        NOTE,
        "Everything that can be set, as the code has it.",
        "## Options of the backend",
        BACKEND,
        _fields(CompileOptions),
        "## Arguments of `fluxcompile.compile`",
        _arguments(fluxcompile.compile),
        "## `FluxConfig`",
        "What a router was trained for, saved beside it; or the settings of fixed routes.",
        _fields(fluxcompile.FluxConfig),
        "## `FluxCache`",
        _arguments(fluxcompile.FluxCache),
        "## `soft_routes`",
        _arguments(fluxcompile.soft_routes),
        "## `train_router`",
        _arguments(fluxcompile.train_router),
        "## Training arguments",
        "What else `train_router` takes. The rest is transformers' `TrainingArguments`.",
        _training(),
        "## `adapt_backbone`",
        _arguments(fluxcompile.adapt_backbone),
        "## Commands",
        *_commands(),
    ]
    return "\n\n".join(sections) + "\n"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _fields(settings: type, names: Iterable[str] | None = None) -> str:
    """Fields of a dataclass: name, default, meaning."""
    meaning = described(settings, "Attributes")
    rows = []
    for field in dataclasses.fields(settings):
        if names is not None and field.name not in names:
            continue
        if field.name not in meaning:
            raise ValueError(f"{settings.__name__}.{field.name}: expected a line in the docstring")
        rows.append((f"`{field.name}`", _default(field), meaning[field.name]))
    return table(("option", "default", "meaning"), rows)


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return code(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return code(field.default_factory())
    return "required"


def _arguments(function: Any) -> str:
    """Arguments of a function: name, default, meaning."""
    meaning = described(function, "Args")
    rows = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in meaning:
            raise ValueError(f"{function.__name__}({name}): expected a line in the docstring")
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            rows.append((f"`**{name}`", "", meaning[name]))
            continue
        required = parameter.default is inspect.Parameter.empty
        rows.append(
            (f"`{name}`", "required" if required else code(parameter.default), meaning[name])
        )
    return table(("argument", "default", "meaning"), rows)


def _training() -> str:
    """Our own training arguments, and transformers' with another default."""
    meaning = described(CompiledTrainingArguments, "Attributes")
    meaning |= described(RouterTrainingArguments, "Attributes")
    fields = {field.name: field for field in dataclasses.fields(RouterTrainingArguments)}
    return table(
        ("argument", "default", "meaning"),
        ((f"`{name}`", _default(fields[name]), text) for name, text in meaning.items()),
    )


def _commands() -> list[str]:
    """From the functions behind the commands: typer's own objects differ between its versions."""
    named = {info.name or info.callback.__name__: info.callback for info in app.registered_commands}
    sections = []
    for name, function in sorted(named.items()):
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
        sections += [
            f"### `fluxcompile {name}`",
            " ".join((inspect.getdoc(function) or "").split()),
            table(
                ("option", "default", "meaning"), (_parameter(p, hints[p.name]) for p in parameters)
            ),
        ]
    return sections


def _parameter(parameter: inspect.Parameter, hint: Any) -> tuple[str, str, str]:
    """An option or argument of a command."""
    kind, info = get_args(hint)
    # Inside of Annotated typer takes the first name for a default.
    given = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    names = given or [f"--{parameter.name.replace('_', '-')}"]
    if isinstance(info, ArgumentInfo):
        names = [parameter.name.upper()]
    if not info.help:
        raise ValueError(f"{names[0]}: expected a help text")
    words = [info.help]
    (choice,) = [t for t in get_args(kind) or (kind,) if t is not type(None)][:1]
    if isinstance(choice, type) and issubclass(choice, StrEnum):
        words.append(f"One of {', '.join(choice)}.")
    if parameter.default is inspect.Parameter.empty:
        default = "required"
    elif parameter.default is None or parameter.default is False:
        default = ""
    else:
        default = code(getattr(parameter.default, "value", parameter.default))
    return ", ".join(f"`{name}`" for name in names), default, markdown(" ".join(words).strip())


def code(value: object) -> str:
    text = repr(value) if not isinstance(value, str) or not value else f'"{value}"'
    return f"`{text}`".replace("|", "\\|")
