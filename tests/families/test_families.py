"""Every family, compiled: its layers are found, its routes and logits are the reference's."""

import itertools

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


#: routes, 1 for full, and the padding of the prompt
PINNED = (((1, 1), "left"), ((0, 0), "left"), ((0, 0), "right"), ((0, 1), "ones"))


def pinned_cases():
    made = {}
    for family, (pattern, padding), static in itertools.product(FAMILIES, PINNED, (False, True)):
        if static and not family.has_cache:
            continue
        if static:  # of a sliding layer: a kind that is not known, so decode would be dense anyway
            pattern = tuple(int(r or w > 0) for r, w in zip(pattern, family.windows, strict=True))
        cache = "static" if static else "grows"
        name = f"{family.name}-{pattern[0]}{pattern[1]}-{padding}-{cache}"
        made[name] = pytest.param(family, pattern, padding, static, id=name)
    return list(made.values())


@pytest.mark.slow
@pytest.mark.parametrize(("family", "pattern", "padding", "static"), pinned_cases())
def test_pinned(family, pattern, padding, static):
    """Every layer full or sparse by request: equal to the explicit mask, call after call."""
    model, twin = family.make(), family.make()
    options = {(1, 1): "full", (0, 0): "sparse"}.get(pattern, pattern)
    unknown = static and any(family.windows) and options != "full"
    made = compiled(model, routes=options, config=config(), strict=not unknown)
    definition = definition_of(all_rows(3, pattern), config())
    for steps in (steps_of(family), GROWING):
        _, tokens, steps = tokens_of(family, steps, padding)
        got = in_steps(family, model, tokens, steps, static)
        assert_logits(got, defined(family, twin, definition, tokens), tokens.valid)
    assert ("streaming" in made.became) == (0 in pattern)
    assert "full" in made.became or 1 not in pattern
    lost = {SkipReason.CACHE_UNKNOWN} if unknown else set()
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
    for steps in (steps_of(family), GROWING):
        _, tokens, steps = tokens_of(family, steps)
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
