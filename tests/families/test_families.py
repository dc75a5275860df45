"""Every family, compiled: its layers are found, its routes and logits are the reference's."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest

import fluxcompile
from fluxcompile.passes.site import SkipReason
from tests.families.drive import (
    defined,
    in_steps,
    make_router,
    mixed_router,
    router_options,
)
from tests.families.families import FAMILIES
from tests.families.family import LAYERS, Family
from tests.parity.harness import all_rows, assert_logits, compiled, definition_of
from tests.parity.models import Prompt, flux_config, forced_router, prompt

pytestmark = pytest.mark.families

SINK, LOCAL = 3, 8
#: past sink + local and past the window of layers that slide, then a token
STEPS = (36, 1)
#: several tokens at once, tokens one by one
MANY_STEPS = (36, 3, 1, 7, 1, 1)
#: where layers slide, a cache of growing length has dropped the sink before several tokens come
SINGLE_STEPS = (36, 1, 1, 1)
#: from below sink + local to above it
GROWING = (SINK + LOCAL - 2, 1, 1, 1, 1)

PREFILL, DECODE = "routed: full or streaming", "decode by device-side route"


def config(**fields):
    return flux_config(sink=SINK, local=LOCAL, **fields)


def each(families=FAMILIES):
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


def tokens_of(family: Family, steps, padding="left") -> tuple[Prompt, Prompt, tuple[int, ...]]:
    """A prompt, all tokens, and the steps to feed them in: what the family can take of it."""
    if not family.has_cache:
        given = prompt(3, sum(steps), "none")
        return given, given, (sum(steps),)
    given = prompt(3, steps[0], padding)
    ids, valid, _ = given.then(prompt(3, sum(steps[1:]), seed=9).ids)
    return given, Prompt(ids, valid), steps


def steps_of(family: Family) -> tuple[int, ...]:
    return SINGLE_STEPS if any(family.windows) else MANY_STEPS


def routable(report) -> list[str]:
    """What became of a graph's self-attentions."""
    return [row.became for row in report.rows if row.reason is None]


@each()
def test_rows_route_by_themselves(family):
    """A random router: what it reads, what it decides, and what is computed then."""
    given, tokens, steps = tokens_of(family, STEPS)
    model, twin = family.make(), family.make()
    seed, full = mixed_router(family, twin, config(), given)
    fluxcompile.attach(model, make_router(family, model, config(), seed))
    made = compiled(model, strict=True)
    got = in_steps(family, model, tokens, steps)
    assert fluxcompile.routes(model).fa.tolist() == full.tolist()
    expected = defined(family, twin, definition_of(full, config()), tokens)
    assert_logits(got, expected, tokens.valid)
    wanted = [PREFILL, DECODE][: len(steps)]
    assert [routable(report) for report in made.reports] == [[w] * LAYERS for w in wanted]


@dataclass(frozen=True)
class Pinned:
    """Routes of the layers, 1 for full, the prompt's padding, the cache, and what is fed in."""

    pattern: tuple[int, int]
    padding: str
    static: bool
    steps: Callable[[Family], tuple[tuple[int, ...], ...]]


PINNED = (
    Pinned((1, 1), "left", False, lambda _: (STEPS,)),
    Pinned((0, 0), "left", False, lambda family: (steps_of(family), GROWING)),
    Pinned((0, 0), "right", True, lambda _: (MANY_STEPS,)),
    Pinned((0, 1), "ones", False, lambda _: (STEPS,)),
)


def pinned_cases():
    made = []
    for family, case in itertools.product(FAMILIES, PINNED):
        if case.static and not family.has_cache:
            continue
        routes = "".join("F" if full else "S" for full in case.pattern)
        name = f"{family.name}-{routes}-{case.padding}-{'static' if case.static else 'grows'}"
        made.append(pytest.param(family, case, id=name))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), pinned_cases())
def test_pinned(family, case):
    """Layers full or sparse by request: equal to the explicit mask, call after call."""
    model, twin, pattern = family.make(), family.make(), case.pattern
    unknown = case.static and any(family.windows)
    if unknown:  # a sliding layer's static cache is of no known kind, so its decode is dense anyway
        pattern = tuple(int(r or w > 0) for r, w in zip(pattern, family.windows, strict=True))
    routes = {(1, 1): "full", (0, 0): "sparse"}.get(pattern, pattern)
    made = compiled(model, True, routes=routes, config=config(), strict=not unknown)
    definition = definition_of(all_rows(3, pattern), config())
    for steps in case.steps(family):
        _, tokens, steps = tokens_of(family, steps, case.padding)
        got = in_steps(family, model, tokens, steps, case.static)
        assert_logits(got, defined(family, twin, definition, tokens), tokens.valid)
    assert ("streaming" in made.became) == (0 in pattern)
    assert "full" in made.became or 1 not in pattern
    lost = {SkipReason.CACHE_UNKNOWN} if unknown and routes != "full" else set()
    assert made.reasons - {None, SkipReason.NOT_CAUSAL} == lost


@pytest.mark.slow
@pytest.mark.parametrize("full", [True, False], ids=["to-full", "to-sparse"])
@each()
def test_forced(family, full):
    """A router that decides one way whatever it reads."""
    model, twin = family.make(), family.make()
    router = forced_router(model, full, config(), **router_options(family))
    fluxcompile.attach(model, router)
    compiled(model, strict=True)
    definition = definition_of(all_rows(3, (full, full)), config())
    _, tokens, steps = tokens_of(family, STEPS)
    got = in_steps(family, model, tokens, steps)
    assert_logits(got, defined(family, twin, definition, tokens), tokens.valid)
    assert fluxcompile.routes(model).fa.tolist() == definition.full.tolist()


@pytest.mark.slow
@each()
def test_explain(family):
    """The layers by name, each with its mask, its window and what it became."""
    model = family.make()
    fluxcompile.attach(model, make_router(family, model, config(), seed=0))
    _, tokens, steps = tokens_of(family, STEPS)
    cache = family.cache(model, False) if family.has_cache else None
    start, names = 0, fluxcompile.FluxRouter.from_model(model, **router_options(family)).layer_names
    for length, became in zip(steps, (PREFILL, DECODE), strict=False):
        now = slice(start, start + length)
        start = now.stop
        inputs = (tokens.ids[:, now], tokens.valid[:, :start], tokens.positions[:, now], cache)
        args, kwargs = family.inputs(*inputs)
        rows = [
            row for row in fluxcompile.explain(model, *args, **kwargs).rows if row.path in names
        ]
        assert [row.path for row in rows] == list(names)
        assert {row.became for row in rows} == {became}
        for row, window in zip(rows, family.windows, strict=True):
            assert row.reason is None
            assert ("valid keys" in row.mask) == family.has_cache
            assert row.mask.endswith(f"window {window}") if window else "window" not in row.mask
            assert row.query_shape[1] == 4
            assert row.key_shape[1] == family.kv_heads
