"""Every family, compiled: its layers are found, its routes and logits are the reference's."""

import itertools

import pytest
import torch

import fluxcompile
from tests.families.drive import decide, defined, in_steps, make_router, mixed_router
from tests.families.families import FAMILIES
from tests.families.family import LAYERS, Family
from tests.parity.harness import all_rows, assert_logits, compiled, definition_of
from tests.parity.models import Prompt, flux_config, forced_router, prompt

pytestmark = pytest.mark.families

SINK, LOCAL = 3, 8
#: a prompt well past sink + local and past the window of layers that slide, then single tokens
STEPS = (36, 1)


def config(**fields):
    return flux_config(sink=SINK, local=LOCAL, **fields)


def each(families=FAMILIES):
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


def split(family: Family, steps, padding="left") -> tuple[Prompt, Prompt]:
    """A prompt of ``steps[0]`` tokens, and all tokens."""
    given = prompt(3, steps[0], padding if family.has_cache else "none")
    if not family.has_cache or len(steps) == 1:
        return given, given
    ids, valid, _ = given.then(prompt(3, sum(steps[1:]), seed=9).ids)
    return given, Prompt(ids, valid)


@each()
def test_rows_route_by_themselves(family):
    """A random router: what it reads, what it decides, and what is computed then."""
    steps = STEPS if family.has_cache else STEPS[:1]
    given, tokens = split(family, steps)
    model, twin = family.make(), family.make()
    seed, full = mixed_router(family, twin, config(), given)
    fluxcompile.attach(model, make_router(family, model, config(), seed))
    made = compiled(model, strict=True)
    got = in_steps(family, model, tokens, steps)
    record = fluxcompile.routes(model)
    assert record.fa.tolist() == full.tolist()
    expected = defined(family, twin, definition_of(full, config()), tokens)
    assert_logits(got, expected, tokens.valid)
    wanted = ["routed: full or streaming", "decode by device-side route"][: len(steps)]
    assert [own_layers(report) for report in made.reports] == [[w] * LAYERS for w in wanted]


def own_layers(report) -> list[str]:
    """What became of the self-attentions of a graph."""
    return [row.became for row in report.rows if row.reason is None]
