"""Every sparse mode and the retrieval mode in a whole model, lowered, with rows that differ."""

import pytest

import fluxcompile
from tests.parity.harness import assert_logits, eager, forward
from tests.parity.models import flux_config, prompt, random_router, tiny_model

BLOCKS = {"block": 16, "stride": 4, "last": 5}
MODES = {
    "triangle": {"sparse": "triangle"},
    "power": {"sparse": "power"},
    "xattention": {"sparse": "xattention", "threshold": 0.5},
    "retrieval": {"retrieval": "xattention", "threshold": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", MODES)
def test_lowered_modes_equal_the_eager_graph(mode, lowering):
    """What the modes compute is tested operator by operator; here, that no lowering changes it."""
    model = tiny_model("qwen3")
    fluxcompile.attach(model, random_router(model, flux_config(**BLOCKS, **MODES[mode])))
    given, logits, omegas = prompt(4, 90, "left"), [], []
    for how in ("eager", lowering):
        model.compile(backend="flux", dynamic=True, options={"lowering": how, "strict": True})
        logits.append(forward(model, given))
        omegas.append(fluxcompile.routes(model).omega)
        eager(model)
    assert 0 < omegas[0] == omegas[1] < 1
    assert_logits(logits[1], logits[0], given.valid)
