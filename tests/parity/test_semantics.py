"""Routes belong to a sequence of tokens: they travel with its cache, and are lost with it."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

import fluxcompile
from tests.parity.decide import decide
from tests.parity.harness import (
    all_rows,
    assert_logits,
    compiled,
    definition_of,
    generate,
)
from tests.parity.models import (
    Prompt,
    flux_config,
    forced_router,
    prompt,
    random_router,
    tiny_model,
)
from tests.parity.reference import routed_logits

CACHES = ("dynamic", "static")
LOST = "the key/value cache has no routes"


class Conversation:
    """One sequence driven by hand through ``forward``, and what the reference says of it."""

    def __init__(self, model, given: Prompt, cache: str, cache_object=None) -> None:
        self.model, self.ids = model, given.ids[:, :0]
        self.logits = []
        if cache_object is not None:
            self.cache = cache_object
        elif cache == "static":
            self.cache = StaticCache(config=model.config, max_cache_len=128)
        else:
            self.cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def say(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed ``ids`` ``[B, N]`` on top of what there is; returns their logits."""
        start = self.ids.shape[1]
        self.ids = torch.cat((self.ids, ids), dim=1)
        positions = torch.arange(start, self.ids.shape[1]).expand(ids.shape[0], -1)
        logits = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(self.ids),
            position_ids=positions,
            past_key_values=self.cache,
        ).logits
        self.logits.append(logits)
        return logits

    def answer(self, tokens: int) -> None:
        """Greedy decoding, a token at a time."""
        for _ in range(tokens):
            self.say(self.logits[-1][:, -1:].argmax(-1))

    def assert_is(self, twin, full: torch.Tensor, config, dense_from: int | None = None) -> None:
        definition = definition_of(full, config, dense_from)
        expected = routed_logits(twin, definition, self.ids, use_cache=False)
        assert_logits(torch.cat(self.logits, dim=1), expected, torch.ones_like(self.ids))


def setting(kind="llama", router_of=random_router, **options):
    model, twin = tiny_model(kind), tiny_model(kind)
    router = router_of(model)
    fluxcompile.attach(model, router)
    return compiled(model, **options), twin, router


def to_sparse(model):
    return forced_router(model, full=False)


def unlike_prompts(twin, router, count=2, length=50):
    """Single prompts whose routes differ from one another."""
    found: dict[str, tuple[Prompt, torch.Tensor]] = {}
    for seed in range(40):
        given = prompt(1, length, seed=seed)
        full = decide(twin, router, given)
        found.setdefault(str(full.tolist()), (given, full))
        if len(found) == count:
            return list(found.values())
    raise AssertionError("another seed: the router decides alike for every prompt")


@pytest.mark.parametrize("cache", CACHES)
def test_interleaved_generations_do_not_mix(cache):
    made, twin, router = setting(strict=True)
    (one, full_one), (other, full_other) = unlike_prompts(twin, router)
    a, b = (Conversation(made.model, given, cache) for given in (one, other))
    a.say(one.ids)
    b.say(other.ids)
    for _ in range(3):
        a.answer(1)
        b.answer(1)
    b.answer(1)
    a.answer(1)
    a.assert_is(twin, full_one, router.config)
    b.assert_is(twin, full_other, router.config)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_later_turns_keep_the_routes(kind, cache):
    """Next chat turns and chunks of a prompt: the first call decides for all."""
    made, twin, router = setting(kind, strict=True)
    (given, full), _ = unlike_prompts(twin, router)
    talk = Conversation(made.model, given, cache)
    talk.say(given.ids)
    record = fluxcompile.routes(made.model).fa.tolist()
    assert record == full.tolist()
    talk.answer(2)
    talk.say(prompt(1, 9, seed=77).ids)
    talk.say(prompt(1, 23, seed=78).ids)
    talk.answer(3)
    talk.assert_is(twin, full, router.config)
    assert fluxcompile.routes(made.model).fa.tolist() == record


def test_chunks_of_one_token_from_the_start():
    """A prompt fed a token at a time shows no pattern: full attention, in both caches."""
    for cache in CACHES:
        made, twin, router = setting(router_of=to_sparse)
        given = prompt(1, 30)
        talk = Conversation(made.model, given, cache)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for token in range(30):
                talk.say(given.ids[:, token : token + 1])
        decided = fluxcompile.routes(made.model).fa
        talk.assert_is(twin, decided, router.config)
        torch._dynamo.reset()


def lost_by(cache: DynamicCache, how: str) -> DynamicCache:
    """The same tokens (crop: five fewer) in a cache that the runtime has never seen."""
    if how == "crop":
        cache.crop(-5)
    elif how == "reorder":
        cache.reorder_cache(torch.arange(cache.layers[0].keys.shape[0]))
    elif how == "select":
        cache.batch_select_indices(torch.arange(cache.layers[0].keys.shape[0]))
    return cache


@pytest.mark.parametrize("how", ["crop", "reorder", pytest.param("select", marks=pytest.mark.slow)])
def test_lost_routes_are_full_attention_with_one_warning(how):
    made, twin, router = setting(router_of=to_sparse)
    given = prompt(2, 60)
    talk = Conversation(made.model, given, "dynamic")
    talk.say(given.ids)
    talk.answer(2)
    lost_by(talk.cache, how)
    kept = talk.cache.get_seq_length()
    talk.ids = talk.ids[:, :kept]
    talk.logits = [torch.cat(talk.logits, dim=1)[:, :kept]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        talk.answer(4)
    said = [w for w in caught if LOST in str(w.message)]
    assert [w.category for w in said] == [fluxcompile.FluxWarning]
    talk.assert_is(twin, all_rows(2, [0, 0]), router.config, dense_from=kept)


@pytest.mark.parametrize("new", [1, 7], ids=["decode", "chunk"])
@pytest.mark.parametrize("cache", CACHES)
def test_cache_filled_by_the_eager_model(cache, new):
    made, twin, router = setting(router_of=to_sparse)
    given = prompt(2, 60)
    talk = Conversation(tiny_model("llama"), given, cache)
    talk.say(given.ids)
    talk.model = made.model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        talk.say(prompt(2, new, seed=5).ids)
        talk.answer(2)
    talk.assert_is(twin, all_rows(2, [1, 1]), router.config)
    # A chunk on a static cache may be a new prompt: only the device knows, so nobody is warned.
    silent = cache == "static" and new > 1
    assert len([w for w in caught if LOST in str(w.message)]) == (0 if silent else 1)


def test_static_cache_refilled_by_the_eager_model():
    """The buffer is the same object; what is in it is not."""
    made, twin, router = setting(router_of=to_sparse)
    given, other = prompt(2, 60), prompt(2, 60, seed=1)
    first = Conversation(made.model, given, "static")
    first.say(given.ids)
    first.answer(1)
    first.cache.reset()
    talk = Conversation(tiny_model("llama"), other, "static", first.cache)
    talk.say(other.ids)
    talk.model = made.model
    with pytest.warns(fluxcompile.FluxWarning, match=LOST):
        talk.answer(1)
    talk.answer(2)
    talk.assert_is(twin, all_rows(2, [1, 1]), router.config)


@pytest.mark.parametrize("how", ["crop", "foreign"])
def test_strict_raises_where_routes_are_lost(how):
    made, _, _ = setting(router_of=to_sparse, strict=True)
    given = prompt(1, 60)
    talk = Conversation(tiny_model("llama") if how == "foreign" else made.model, given, "dynamic")
    talk.say(given.ids)
    if how == "crop":
        talk.answer(1)
        talk.cache.crop(-5)
        talk.ids = talk.ids[:, :-5]
    talk.model = made.model
    with pytest.raises(fluxcompile.RewriteError, match=LOST):
        talk.answer(1)


def test_static_cache_decides_anew_after_reset():
    made, twin, router = setting(strict=True)
    (one, full_one), (other, full_other) = unlike_prompts(twin, router)
    talk = Conversation(made.model, one, "static")
    for given, full in ((one, full_one), (other, full_other), (one, full_one)):
        talk.cache.reset()
        talk = Conversation(made.model, given, "static", talk.cache)
        talk.say(given.ids)
        assert fluxcompile.routes(made.model).fa.tolist() == full.tolist()
        talk.answer(3)
        talk.assert_is(twin, full, router.config)


@torch.no_grad()
def test_static_cache_of_unpadded_prompts_decides_anew():
    """As above, by prompts without any mask, of which HF reads only their part of the buffer."""
    made, twin, router = setting(strict=True)
    cache = StaticCache(config=made.model.config, max_cache_len=128)
    for given, full in unlike_prompts(twin, router) * 2:
        cache.reset()
        ids = given.ids
        made.model(input_ids=ids, past_key_values=cache)
        for _ in range(2):
            ids = torch.cat((ids, prompt(1, 1, seed=ids.shape[1]).ids), dim=1)
            logits = made.model(input_ids=ids[:, -1:], past_key_values=cache).logits
        expected = routed_logits(twin, definition_of(full, router.config), ids, use_cache=False)
        assert_logits(logits, expected[:, -1:], torch.ones(1, 1))


def test_batch_size_may_change_between_prompts():
    made, twin, router = setting(strict=True)
    for batch in (1, 3, 2):
        given = prompt(batch, 50, seed=batch)
        talk = Conversation(made.model, given, "dynamic")
        talk.say(given.ids)
        talk.answer(2)
        talk.assert_is(twin, decide(twin, router, given), router.config)


@torch.no_grad()
def beams(model, given):
    return model.generate(
        given.ids,
        attention_mask=given.mask,
        num_beams=3,
        max_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        disable_compile=True,
    )


def test_beam_search_with_full_routes_is_eager():
    model, given = tiny_model("llama"), prompt(2, 50, "left")
    expected = beams(model, given)
    compiled(model, routes="full", config=flux_config(), strict=True)
    got = beams(model, given)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores)


def test_beam_search_loses_routes_at_its_first_reordering():
    """Beams are reordered before every step after the prompt: the prompt itself is routed, what
    follows it is dense. The scores of the returned sequences say so."""
    made, twin, router = setting(router_of=to_sparse)
    given = prompt(2, 50, "left")
    with pytest.warns(fluxcompile.FluxWarning, match=LOST):
        got = beams(made.model, given)
    tokens = got.sequences[:, 50:]
    ids, valid, positions = given.then(tokens)
    definition = definition_of(all_rows(2, [0, 0]), router.config, dense_from=50)
    logits = routed_logits(
        twin, definition, ids, attention_mask=valid, position_ids=positions, use_cache=False
    )
    chosen = logits[:, 49:-1].log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(got.sequences_scores, chosen.mean(-1), atol=1e-4, rtol=0)


def test_routes_do_not_outlive_their_cache():
    from fluxcompile.kept_routes import _routes_of_cache

    made, _, _ = setting(strict=True)
    given = prompt(2, 50)
    gc.collect()
    before = len(_routes_of_cache)
    generate(made.model, given, 4)
    gc.collect()
    assert len(_routes_of_cache) == before
