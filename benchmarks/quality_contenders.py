"""Who takes part: routers and patterns as the command line names them, and what they scored."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fluxcompile.config import FluxConfig
from fluxcompile.errors import OptionError
from fluxcompile.evaluation import Results
from fluxcompile.passes.branch_attention import FIELDS
from fluxcompile.router import FluxRouter

REACH = ("sink", "local")  # settings that decide every mode, in decode at least


@dataclass(frozen=True, eq=False)
class NamedRouter:
    """A router and where it is from, with a ``bias`` that it has been given since.

    ``name`` is unique, ``recipe`` shared by its seeds of one bias.
    """

    name: str
    recipe: str
    directory: str
    router: FluxRouter
    bias: float = 0.0


@dataclass(frozen=True, eq=False)
class Run:
    """One contender's results, over every cell.

    Attributes:
        name: in tables and plots.
        config: of the sparse attention.
        results: by cell.
        through: ``"user"`` (an inference compile) or ``"graph"`` (the shared training graph).
        seconds: compiling included.
    """

    kind: ClassVar[str] = "full"
    name: str
    config: FluxConfig
    results: Results
    through: str
    seconds: float

    @property
    def sparse(self) -> str | None:
        """Its sparse attention, as `sparse_mode` says it; None where all is full."""
        return None if self.kind == "full" else sparse_mode(self.config)


@dataclass(frozen=True, eq=False)
class RouterRun(Run):
    """Of a learned router."""

    kind: ClassVar[str] = "router"
    source: NamedRouter = field(kw_only=True)


@dataclass(frozen=True, eq=False)
class StaticRun(Run):
    """Of fixed ``routes``, one 0/1 a layer, 1 for full attention."""

    kind: ClassVar[str] = "static"
    routes: tuple[int, ...] = field(kw_only=True)

    @property
    def sparse_layers(self) -> int:
        return self.routes.count(0)


def sparse_mode(config: FluxConfig) -> str:
    """What routes to ``config`` compute, in words: mode, sink+local, and whatever else decides it.

    The other settings say what a router reads.
    """
    fields = FIELDS[config.sparse]
    words = [config.sparse, f"{config.sink}+{config.local}"]
    if config.retrieval != "full":
        fields = dict.fromkeys((*fields, *FIELDS[config.retrieval]))
        words.append(f"retrieval {config.retrieval}")
    words += [f"{name} {getattr(config, name)}" for name in fields if name not in REACH]
    return " ".join(words) + (" dense decode" if config.decode == "dense" else "")


def same_attention(one: FluxConfig, other: FluxConfig) -> bool:
    """Whether routes to either mean the same attention."""
    return sparse_mode(one) == sparse_mode(other)


def given_routers(
    options: Sequence[Sequence[str]], biases: Sequence[float] = (0.0,)
) -> list[NamedRouter]:
    """From ``[["NAME=DIR", "DIR", ...], ...]``; a name's second router is ``NAME#2``.

    A shell makes ``NAME=DIR0 NAME=DIR1`` of ``NAME=DIR{0,1}``: the name may come again. Every
    router takes part once for each of ``biases``; those of another bias than 0 say it in the name.

    Raises:
        OptionError: no name.
        RouterError: a directory holds no router.
    """
    found: list[NamedRouter] = []
    for option in options:
        name = option[0].partition("=")[0]
        for i_directory, text in enumerate(option):
            directory = text.removeprefix(f"{name}=")
            if not name or not directory or (i_directory == 0 and directory == text):
                raise OptionError.mismatch("--router", "NAME=DIR", repr(text))
            router = FluxRouter.from_pretrained(directory)
            for bias in biases:
                recipe = f"{name} {bias:+g}" if bias else name
                seeds = sum(other.recipe == recipe for other in found)
                unique = f"{recipe}#{seeds + 1}" if seeds else recipe
                found.append(NamedRouter(unique, recipe, directory, router.biased(bias), bias))
    return found


def given_patterns(options: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """From ``["NAME=1,0,0", ...]``.

    Raises:
        OptionError: not a name and 0/1 entries.
    """
    patterns = {}
    for text in options:
        name, _, entries = text.partition("=")
        try:
            routes = tuple({"0": 0, "1": 1}[entry.strip()] for entry in entries.split(","))
        except KeyError:
            raise OptionError.mismatch("--static", "NAME=1,0,0,…", repr(text)) from None
        patterns[name] = routes
    return patterns
