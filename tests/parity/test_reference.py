"""The reference itself: all dense it is HF's model; in pieces it is what it is at once."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.parity.harness import all_rows, assert_logits, forward
from tests.parity.models import LOCAL, MODELS, SINK, Prompt, prompt, tiny_model
from tests.parity.reference import RoutedDefinition, reference, routed_logits


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_dense_reference_is_the_model(kind, padding):
    model, given = tiny_model(kind), prompt(3, 70, padding)
    expected = forward(model, given)
    definition = RoutedDefinition(all_rows(3, [1, 1]), SINK, LOCAL)
    got = routed_logits(model, definition, given.ids, attention_mask=given.mask)
    assert_logits(got, expected, given.valid)


@pytest.mark.parametrize("pattern", [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("kind", MODELS)
def test_sparse_reference_differs_from_the_model(kind, pattern):
    model, given = tiny_model(kind), prompt(2, 70)
    definition = RoutedDefinition(all_rows(2, pattern), SINK, LOCAL)
    got = routed_logits(model, definition, given.ids, attention_mask=given.mask)
    difference = (got - forward(model, given)).abs()
    assert difference[:, SINK + LOCAL :].max() > 0.1
    assert difference[:, : SINK + LOCAL].max() < 1e-4


def test_sparse_reference_sees_what_the_definition_says():
    """Sink 1, local 2, six keys of which key 1 is invalid: written out by hand."""
    from tests.parity.reference import Keys, visible

    valid = torch.tensor([[True, False, True, True, True, True]])
    definition = RoutedDefinition(torch.tensor([[False]]), sink=1, local=2)
    seen = visible(definition, 0, Keys(valid, 0, 0), 6, 6, 0)[0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", MODELS)
def test_pieces_equal_the_whole(kind, static):
    model, given = tiny_model(kind), prompt(3, 60, "left")
    definition = RoutedDefinition(torch.tensor([[0, 1], [1, 0], [0, 0]]).bool(), SINK, LOCAL)
    whole = routed_logits(
        model,
        definition,
        given.ids,
        attention_mask=given.mask,
        position_ids=given.positions,
        use_cache=False,
    )
    if static:
        cache = StaticCache(config=model.config, max_cache_len=64)
    else:
        cache = DynamicCache(config=model.config)
    pieces = []
    with reference(model, definition), torch.no_grad():
        for a, b in ((0, 37), (37, 50), (50, 51), (51, 52), (52, 60)):
            out = model.forward(
                input_ids=given.ids[:, a:b],
                attention_mask=given.mask[:, :b],
                position_ids=given.positions[:, a:b],
                past_key_values=cache,
            )
            pieces.append(out.logits)
    assert_logits(torch.cat(pieces, dim=1), whole, given.valid)


def test_a_padded_row_is_its_unpadded_run():
    model, given = tiny_model("llama"), prompt(3, 70, "left")
    definition = RoutedDefinition(all_rows(3, [0, 0]), SINK, LOCAL)
    got = routed_logits(
        model,
        definition,
        given.ids,
        attention_mask=given.mask,
        position_ids=given.positions,
    )
    for row in range(3):
        alone: Prompt = given.row(row)
        one = RoutedDefinition(all_rows(1, [0, 0]), SINK, LOCAL)
        expected = routed_logits(model, one, alone.ids)
        assert_logits(got[row : row + 1, given.valid[row].bool()], expected, alone.valid)
