"""A training row is what inference makes of a prompt in one call and its answer token by token."""

import pytest
import torch
from transformers import DynamicCache

from fluxcompile import soft_routes
from fluxcompile.generation import say_that_it_grows
from tests.parity.models import prompt
from tests.training import cases
from tests.training.cases import LONG

PROMPTS = (LONG - 2, LONG - 9, 30, 12)


@pytest.mark.parametrize(
    ("sparse", "decode", "padding"),
    [
        ("triangle", "sparse", "left"),
        ("triangle", "dense", "left"),
        ("streaming", "dense", "left"),
        pytest.param("triangle", "sparse", "none", marks=pytest.mark.slow),
        pytest.param("triangle", "sparse", "right", marks=pytest.mark.slow),
        pytest.param("streaming", "sparse", "left", marks=pytest.mark.slow),
    ],
)
def test_hard_routes_are_what_inference_computes(sparse, decode, padding):
    settings = {"sparse": sparse, "decode": decode, "last": 5}
    case = cases.trainable("llama", dtype=torch.float32, **settings)
    batch, lengths = prompt(4, LONG, padding), torch.tensor(PROMPTS)
    cases.compiled(case)
    with soft_routes(case.router, temperature=1e-12, prompt_length=lengths) as soft:
        with torch.no_grad():
            places = {} if batch.mask is None else {"position_ids": batch.positions}
            trained = case.model(
                batch.ids, attention_mask=batch.mask, use_cache=False, **places
            ).logits
        assert 0 < soft.shares().mean() < 1, "every row takes the same route: nothing told apart"
    torch._dynamo.reset()
    case.model.compile(backend="flux", options={"lowering": "eager", "strict": True})
    for row, asked in enumerate(PROMPTS):
        ids = batch.row(row).ids
        found = _decoded(case.model, ids, min(asked, ids.shape[1]))
        torch.testing.assert_close(
            trained[row, batch.valid[row].bool()], found, rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def _decoded(model, ids: torch.Tensor, asked: int) -> torch.Tensor:
    """Logits ``[S, V]`` of one row: a call of ``asked`` tokens, then a call a token."""
    cache, logits = DynamicCache(config=model.config), []
    for start in (0, *range(asked, ids.shape[1])):
        stop = start + 1 if start else asked
        part = ids[:, start:stop]
        logits.append(model(part, past_key_values=cache, use_cache=True).logits[0])
        say_that_it_grows(cache)
    return torch.cat(logits)
