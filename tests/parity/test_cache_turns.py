"""A trimmed cache in a longer life: turns, tokens taken back, rows moved, copies, two at a time."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch

import fluxcompile
from tests.parity.caches import (
    FIXED,
    GROWING,
    KINDS,
    ROOM,
    SPARE,
    flux_cache,
    generate_with,
    one_kind_each,
    untrimmed,
)
from tests.parity.harness import all_rows, compiled, definition_of
from tests.parity.models import LOCAL, SINK, Prompt, flux_config, prompt, random_router, tiny_model
from tests.parity.reference import routed_logits
from tests.parity.test_semantics import Conversation, unlike_prompts

PATTERN = (0, 1)


def pinned(**config):
    """A model with a sparse and a full layer, and one to compare with."""
    model = tiny_model("llama")
    made = compiled(model, routes=PATTERN, config=flux_config(**config), strict=True)
    return model, tiny_model("llama"), made


def routed():
    """A router that makes one layer sparse for all rows of a batch and tells them apart by the
    other."""
    model, twin = tiny_model("llama"), tiny_model("llama")
    router = random_router(model, seed=2)
    fluxcompile.attach(model, router)
    made = compiled(model, strict=True)
    return model, twin, router, made


def talk_of(model, given, max_length=None, spare=SPARE) -> Conversation:
    talk = Conversation(model, given, "", flux_cache(model, max_length, spare))
    talk.say(given.ids)
    return talk


def assert_is_the_pattern(talk: Conversation, twin) -> None:
    talk.assert_is(twin, all_rows(talk.ids.shape[0], PATTERN), flux_config())


@pytest.mark.parametrize(("spare", "max_length"), one_kind_each(SPARE, 0))
def test_later_turns(spare, max_length):
    """Steps of a few tokens (they may fit into what is spare or not) and of more than the ring."""
    model, twin, made = pinned()
    talk = talk_of(model, prompt(2, 50), max_length, spare)
    talk.answer(3)
    for length, seed in ((2, 1), (5, 2), (7, 3), (LOCAL + SINK + 13, 4)):
        talk.say(prompt(2, length, seed=seed).ids)
        talk.answer(2)
    talk.answer(LOCAL)
    assert_is_the_pattern(talk, twin)
    assert {"decode of a trimmed ring", "streaming of a trimmed ring"} <= made.became


@pytest.mark.parametrize("max_length", GROWING)
def test_chunks_of_a_prompt_under_a_router(max_length):
    """The first call decides, and trims what later chunks then go through."""
    model, twin, router, _ = routed()
    for given, full in unlike_prompts(twin, router):
        talk = talk_of(model, given, max_length)
        talk.say(prompt(1, 40, seed=9).ids)
        talk.say(prompt(1, 9, seed=8).ids)
        talk.answer(4)
        talk.assert_is(twin, full, router.config)


@pytest.mark.parametrize("max_length", FIXED)
@torch.no_grad()
def test_padding_between_turns(max_length):
    """Tokens that are not valid take no place in a ring."""
    model, twin, _ = pinned()
    cache = flux_cache(model, max_length)
    ids, valid, logits = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0), []
    for length, seed in ((50, 0), (1, 1), (30, 2), (1, 3), (4, 4), (1, 5)):
        given = prompt(2, length, seed=seed)
        mask = torch.ones(2, length)
        mask[1, : length // 3] = 0
        ids, valid = torch.cat((ids, given.ids), 1), torch.cat((valid, mask), 1)
        positions = (valid.cumsum(-1) - 1).clamp(min=0).long()
        logits.append(
            model(
                input_ids=given.ids,
                attention_mask=valid.long(),
                position_ids=positions[:, -length:],
                past_key_values=cache,
            ).logits
        )
    definition = definition_of(all_rows(2, PATTERN), flux_config())
    expected = routed_logits(
        twin,
        definition,
        ids,
        attention_mask=valid.long(),
        position_ids=positions,
        use_cache=False,
    )
    good = valid.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[good], expected[good], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("max_length", FIXED)
def test_crop_takes_back_what_is_spare(max_length):
    model, twin, _ = pinned()
    talk = talk_of(model, prompt(2, 50), max_length)
    talk.answer(3)
    for step in (1, 4, 2):
        talk.say(prompt(2, step, seed=step).ids)
        talk.cache.crop(-step)
        talk.ids = talk.ids[:, :-step]
        talk.logits = [torch.cat(talk.logits, dim=1)[:, :-step]]
        assert int(talk.cache.get_seq_length()) == talk.ids.shape[1]
        talk.answer(3)
    talk.cache.crop(0)
    talk.cache.crop(torch.tensor(0))  # counted on the device, by some versions of generate
    assert not isinstance(talk.cache.layers[0].length, torch.Tensor)
    talk.answer(LOCAL)
    assert_is_the_pattern(talk, twin)


@pytest.mark.parametrize("max_length", KINDS)
def test_crop_refuses_what_is_gone(max_length):
    model, twin, _ = pinned()
    talk = talk_of(model, prompt(1, 50), max_length)
    talk.answer(1)
    length = talk.ids.shape[1]
    talk.cache.crop(-3)
    with pytest.raises(fluxcompile.CacheError, match=rf"at least {length - SPARE} tokens"):
        talk.cache.crop(-2)
    with pytest.raises(fluxcompile.CacheError, match="spare"):
        talk.cache.crop(-40)
    with pytest.raises(fluxcompile.CacheError, match="at most"):
        talk.cache.crop(-400)
    assert int(talk.cache.get_seq_length()) == length - 3  # a refusal changes nothing
    talk.ids, talk.logits = talk.ids[:, :-3], [torch.cat(talk.logits, dim=1)[:, :-3]]
    talk.answer(2)
    assert_is_the_pattern(talk, twin)


@pytest.mark.parametrize("max_length", FIXED)
def test_drafts_are_verified_on_it(max_length):
    """Prompt look-up decoding: several tokens a step, the wrong ones taken back."""
    model, _, _ = pinned()
    given = prompt(1, 50)
    expected = generate_with(model, given, LOCAL + 9, untrimmed(model))
    cache = flux_cache(model, max_length, spare=8)
    got = generate_with(model, given, LOCAL + 9, cache, prompt_lookup_num_tokens=3)
    assert torch.equal(got.tokens, expected.tokens)
    assert cache.memory().trimmed == (0,)


@pytest.mark.parametrize("max_length", GROWING)
def test_a_chat_through_generate(max_length):
    """The history comes again with each turn; what the cache has is not run again."""
    model, _, _ = pinned()
    caches = flux_cache(model, max_length), untrimmed(model)
    history = prompt(2, 50).ids
    for seed in (1, 2):
        mask = torch.ones_like(history)
        mask[1, :9] = 0
        got, expected = (generate_with(model, Prompt(history, mask), 5, c) for c in caches)
        assert torch.equal(got.tokens, expected.tokens)
        history = torch.cat((history, got.tokens, prompt(2, 11, seed=seed).ids), dim=1)
    assert caches[0].memory().trimmed == (0,)


@torch.no_grad()
def beams(model, given, cache):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return model.generate(
            given.ids,
            attention_mask=given.mask,
            num_beams=3,
            max_new_tokens=LOCAL + 6,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            past_key_values=cache,
        )


@pytest.mark.parametrize("max_length", GROWING)
def test_beam_search_keeps_routes(max_length):
    """Rows of a trimmed cache move with their routes: what follows the prompt stays routed."""
    model, twin, router, _ = routed()
    given, full = next(pair for pair in unlike_prompts(twin, router) if not pair[1].all())
    cache = flux_cache(model, max_length)
    got = beams(model, given, cache)
    tokens = got.sequences[:, given.ids.shape[1] :]
    ids, valid, positions = given.then(tokens)
    logits = routed_logits(
        twin,
        definition_of(full, router.config),
        ids,
        attention_mask=valid,
        position_ids=positions,
        use_cache=False,
    )
    chosen = logits[:, given.ids.shape[1] - 1 : -1].log_softmax(-1).gather(-1, tokens[..., None])
    torch.testing.assert_close(got.sequences_scores, chosen[..., 0].mean(-1), atol=1e-4, rtol=0)
    assert cache.memory().trimmed == tuple((~full[0]).nonzero().flatten().tolist())


@pytest.mark.parametrize("max_length", FIXED)
@pytest.mark.parametrize("how", ["repeat", "select", "mask", "reorder"])
def test_rows_move_with_their_routes(how, max_length):
    model, twin, router, _ = routed()
    given = prompt(3, 50)
    talk = talk_of(model, given, max_length)
    full = fluxcompile.routes(model).fa
    assert full[0].ne(full[1]).any(), "another seed: the rows take the same routes"
    if how == "repeat":
        rows = torch.tensor([0, 0, 1, 1, 2, 2])
        talk.cache.batch_repeat_interleave(2)
    elif how == "reorder":
        rows = torch.tensor([2, 0, 0])
        talk.cache.reorder_cache(rows)
    else:
        rows = torch.tensor([0, 2])
        picked = rows if how == "select" else torch.tensor([True, False, True])
        talk.cache.batch_select_indices(picked)
    talk.ids, talk.logits = talk.ids[rows], [talk.logits[0][rows]]
    talk.answer(6)
    talk.assert_is(twin, full[rows], router.config)


@pytest.mark.parametrize("max_length", GROWING)
def test_two_caches_take_turns(max_length):
    model, twin, router, _ = routed()
    talks = []
    for given, full in unlike_prompts(twin, router):
        talks.append((talk_of(model, given, max_length), full))
    for _ in range(LOCAL // 2):
        for talk, _ in talks:
            talk.answer(1)
    for talk, full in talks:
        talk.answer(LOCAL)
        talk.assert_is(twin, full, router.config)


def through_a_file(cache):
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("max_length", FIXED)
@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
def test_a_copy_goes_its_own_way(copied, max_length):
    """With its routes, where rows of a kept layer differ too."""
    model, twin, router, _ = routed()
    given = prompt(3, 50)
    talk = talk_of(model, given, max_length)
    full = fluxcompile.routes(model).fa
    assert full[0].ne(full[1]).any(), "another seed: the rows take the same routes"
    talk.answer(2)
    other = Conversation(model, given, "", copied(talk.cache))
    other.ids, other.logits = talk.ids, list(talk.logits)
    talk.say(prompt(3, 4, seed=1).ids)
    other.say(prompt(3, 4, seed=2).ids)
    for conversation in (talk, other):
        conversation.answer(6)
        conversation.assert_is(twin, full, router.config)


@pytest.mark.parametrize("max_length", FIXED)
def test_reset_decides_anew(max_length):
    model, twin, router, _ = routed()
    cache = flux_cache(model, max_length)
    for given, full in unlike_prompts(twin, router, count=3):
        cache.reset()
        talk = Conversation(model, given, "", cache)
        talk.say(given.ids)
        talk.answer(4)
        talk.assert_is(twin, full, router.config)
        assert cache.memory().trimmed == tuple((~full[0]).nonzero().flatten().tolist())
    assert cache.get_seq_length() < ROOM
