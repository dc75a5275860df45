"""Ways to generate, each equal to the eager model that attends by the same routes.

Greedy decoding, padding, caches and growth over the sparse boundary are in ``tests/parity``.
"""

import itertools
from dataclasses import replace

import pytest
import torch

import fluxcompile
from tests.generation.cases import MODES, NEW, case
from tests.parity.models import LOCAL, SINK, Prompt, prompt, tiny_model

#: shorter than sink + local when it begins, longer when it ends
SHORT = SINK + LOCAL - 3
LONG = 50


def cases(*known: tuple, default: tuple):
    """All cases, of which only ``default`` runs in CI."""
    slow = (pytest.mark.slow,)
    return [pytest.param(*c, marks=() if c == default else slow) for c in known]


@pytest.mark.parametrize(
    ("mode", "length"),
    cases(*itertools.product(MODES, (SHORT, LONG)), default=("router", SHORT)),
)
def test_sampling_with_a_seed(mode, length):
    """The same seed draws the same tokens, for several sequences a prompt; another one others."""
    made, given = case(mode), prompt(2, length, "left")
    options = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2}
    got = made.generate(given, **options)
    assert got.tolist() == made.expected(given, rows=2, **options).tolist()
    assert got.tolist() != made.generate(given, seed=1, **options).tolist()


@pytest.mark.parametrize(
    ("mode", "length"),
    cases(*itertools.product(("pattern", "sparse"), (SHORT, LONG)), default=("pattern", LONG)),
)
def test_beam_search(mode, length):
    """Pinned routes are every beam's, wherever its cache came from."""
    made, given = case(mode), prompt(2, length, "left")
    got = made.generate(given, num_beams=3)
    assert got.tolist() == made.expected(given, rows=3, num_beams=3).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "pattern", "sparse"])
def test_drafts_of_prompt_lookup(mode):
    """Several tokens verified at once, some taken back: the tokens of greedy decoding."""
    made, given = case(mode, strict=mode != "full"), prompt(1, 30)
    given.ids[:, 15:] = given.ids[:, :15]  # something to look up
    got = made.generate(given, prompt_lookup_num_tokens=3, max_new_tokens=2 * NEW)
    assert got.tolist() == made.expected(given, max_new_tokens=2 * NEW).tolist()


@pytest.mark.parametrize("mode", ["full", pytest.param("pattern", marks=pytest.mark.slow)])
def test_drafts_of_an_assistant(mode):
    """Both models compiled, the assistant sparse: what it says may be refused, never believed.

    A cropped cache has lost its routes, which is full attention, here what the router wants.
    """
    made, given = case(mode, strict=mode != "full"), prompt(1, LONG)
    assistant = tiny_model("llama", num_hidden_layers=1)
    fluxcompile.compile(assistant, routes=[0], lowering="eager", strict=True)
    got = made.generate(given, assistant_model=assistant)
    assert got.tolist() == made.expected(given).tolist()


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["router", "full", "pattern"])
def test_turns_through_generate(mode):
    """The cache of one ``generate`` goes into the next: its rows keep their routes."""
    made, given = case(mode), prompt(2, 50)
    options = {"attention_mask": None, "do_sample": False, "max_new_tokens": 3}
    first = made.model.generate(given.ids, return_dict_in_generate=True, **options)
    again = torch.cat((first.sequences, prompt(2, 11, seed=5).ids), dim=1)
    second = made.model.generate(again, past_key_values=first.past_key_values, **options)
    # By the definition, a later turn is a longer sequence under the first prompt's routes.
    full = None if made.routes is None else made.routes(given)
    later = replace(made, routes=None if full is None else lambda _: full)
    whole = later.expected(Prompt(again, None), max_new_tokens=3)
    assert second[:, again.shape[1] :].tolist() == whole.tolist()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["router", pytest.param("pattern", marks=pytest.mark.slow)])
def test_inputs_embeds(mode):
    """A prompt given as vectors is routed and answered as the same prompt in tokens."""
    made, given = case(mode), prompt(3, 50, "left")
    vectors = made.model.get_input_embeddings()(given.ids)
    got = made.model.generate(
        inputs_embeds=vectors, attention_mask=given.mask, max_new_tokens=NEW, do_sample=False
    )
    assert got.tolist() == made.expected(given).tolist()
    if mode == "router":
        assert fluxcompile.routes(made.model).fa.tolist() == made.routes(given).tolist()


@torch.no_grad()
def test_logits_to_keep():
    """Routes are decided by the whole prompt, whichever logits are wanted."""
    made, given = case("router"), prompt(3, 50, "left")
    inputs = {"input_ids": given.ids, "attention_mask": given.mask}
    every = made.model(**inputs).logits
    full = fluxcompile.routes(made.model).fa.tolist()
    assert full == made.routes(given).tolist()
    for keep, rows in ((7, slice(-7, None)), (torch.tensor([3, 49]),) * 2):
        logits = made.model(**inputs, logits_to_keep=keep).logits
        torch.testing.assert_close(logits, every[:, rows], atol=1e-5, rtol=1e-5)
        assert fluxcompile.routes(made.model).fa.tolist() == full
