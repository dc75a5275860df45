"""Both ways to score a prompt: what a user gets, and the training graph routed hard."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

import fluxcompile
from fluxcompile import FluxConfig, FluxRouter
from fluxcompile.errors import ConfigError, DataError, RouterError, TrainingError
from fluxcompile.evaluation import AsUser, OneGraph
from fluxcompile.evaluation.as_user import STEPS
from fluxcompile.evaluation.prompts import Prompt, check_lengths
from fluxcompile.generation import say_that_it_grows
from fluxcompile.training.patterns import serves
from tests.evaluation import cases

PROMPTS = cases.prompts(6)


def eager_scores(llama, prompt: Prompt):
    """Mean loss and exactness of the targets under full attention."""
    ids = torch.tensor([prompt.prompt + prompt.target])
    start = len(prompt.prompt)
    with torch.no_grad():
        logits = llama(ids).logits[0, start - 1 : -1]
    targets = torch.tensor(prompt.target)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    return float(loss), bool((logits.argmax(-1) == targets).all())


def assert_same(found, expected):
    assert torch.equal(found.full, expected.full)
    assert torch.equal(found.exact, expected.exact)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["as user", "one graph"])
def test_full_attention_scores_what_eager_does(engine):
    llama = cases.model()
    # Two rows whose targets are what the model says.
    greedy = [
        Prompt(p.prompt, tuple(_generated(llama, p.prompt, len(p.target)))) for p in PROMPTS[:2]
    ]
    batch = [*PROMPTS[:3], *greedy]
    expected = [eager_scores(llama, prompt) for prompt in batch]
    assert [exact for _, exact in expected] == [False, False, False, True, True]
    if engine == "as user":
        with AsUser.of(llama, routes="full", config=cases.CONFIG, lowering="eager") as run:
            found = run(batch)
    else:
        with OneGraph.of(llama, cases.CONFIG, lowering="eager") as graph:
            found = graph.pattern([1] * cases.LAYERS)(batch)
    assert found.exact.tolist() == [exact for _, exact in expected]
    assert found.loss.tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert found.full.all()


def test_exact_is_what_greedy_generation_says():
    """Under a router that divides the rows; one token otherwise, and it is not."""
    llama = cases.model()
    router = cases.divided_router(llama, PROMPTS)
    said = _decoded(llama, router, [prompt.prompt for prompt in PROMPTS], 6)
    generated = [Prompt(p.prompt, tokens) for p, tokens in zip(PROMPTS, said, strict=True)]
    other = [Prompt(p.prompt, (*p.target[:4], 60 - p.target[4], 3)) for p in generated]
    with AsUser.of(llama, router=router, lowering="eager") as run:
        found = run(generated)
        assert 0 < found.full.double().mean() < 1
        assert found.exact.all()
        assert not run(other).exact.any()


@torch.no_grad()
def _decoded(llama, router, prompts, n) -> list[tuple[int, ...]]:
    """``n`` tokens for each prompt by the compiled model, one at a time."""
    fluxcompile.attach(llama, router)
    llama.compile(backend="flux", options={"lowering": "eager", "strict": True})
    said = []
    for prompt in prompts:
        cache, ids, tokens = DynamicCache(config=llama.config), torch.tensor([prompt]), []
        for _ in range(n):
            logits = llama(ids, past_key_values=cache, use_cache=True).logits
            ids = logits[:, -1:].argmax(dim=-1)
            tokens.append(int(ids))
            say_that_it_grows(cache)
        said.append(tuple(tokens))
    llama._compiled_call_impl = None
    fluxcompile.detach(llama)
    return said


@torch.no_grad()
def _generated(llama, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(llama(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "routes",
    [[0, 1, 0], *(pytest.param(x, marks=pytest.mark.slow) for x in ([0, 0, 0], [1, 0, 1]))],
    ids=str,
)
def test_patterns_are_the_same_both_ways(routes):
    """Targets of one token among them."""
    llama = cases.model()
    short = [Prompt(p.prompt, p.target[:1]) for p in PROMPTS]
    with AsUser.of(llama, routes=routes, config=cases.CONFIG, lowering="eager") as run:
        expected = run(PROMPTS)
    with AsUser.of(llama, routes="full", config=cases.CONFIG, lowering="eager") as run:
        full, of_one_token = run(PROMPTS), run(short)
    with OneGraph.of(llama, cases.CONFIG, lowering="eager") as graph:
        found = graph.pattern(routes)(PROMPTS)
        assert_same(graph.pattern([1, 1, 1])(short), of_one_token)
    assert_same(found, expected)
    assert found.full.tolist() == [[bool(full) for full in routes]] * len(PROMPTS)
    assert (found.loss - full.loss).abs().min() > 1e-3, "sparse attention does not show"


def test_layers_compiled_one_by_one_score_the_same():
    llama = cases.model()
    router = cases.divided_router(llama, PROMPTS)
    found = []
    for regional in (False, True):
        how = {"lowering": "eager", "regional": regional}
        with OneGraph.of(llama, cases.CONFIG, **how) as graph:
            found.append((graph.routed(router)(PROMPTS), graph.pattern([0, 1, 0])(PROMPTS)))
    for whole, by_layer in zip(*found, strict=True):
        assert_same(by_layer, whole)
    assert 0 < found[0][0].full.double().mean() < 1, "every row takes the same routes"


def test_routers_are_the_same_both_ways():
    """And as a user: two graphs serve every length."""
    llama = cases.model()
    router = cases.divided_router(llama, PROMPTS)
    with AsUser.of(llama, router=router, lowering="eager") as run:
        expected = run(PROMPTS)
        with torch.compiler.set_stance("fail_on_recompile"):
            run(cases.prompts(6, shortest=130, targets=30))
    assert 0 < expected.full.double().mean() < 1, "every row takes the same routes"
    # The last tokens that a router pools are the prompt's, whatever follows.
    other = [Prompt(p.prompt, q.target) for p, q in zip(PROMPTS, PROMPTS[::-1], strict=True)]
    with OneGraph.of(llama, cases.CONFIG, lowering="eager") as graph:
        run = graph.routed(router)
        one, two = run(PROMPTS), run(other)
    assert_same(one, expected)
    assert torch.equal(one.full, two.full)
    assert (one.loss != two.loss).any()


@pytest.mark.parametrize(
    ("sparse", "decode", "targets"),
    [
        pytest.param("triangle", "sparse", 9, marks=pytest.mark.slow),
        ("triangle", "sparse", 90),
        pytest.param("triangle", "dense", 9, marks=pytest.mark.slow),
        pytest.param("streaming", "dense", 9, marks=pytest.mark.slow),
        pytest.param("streaming", "dense", 90, marks=pytest.mark.slow),
    ],
)
def test_other_modes_are_the_same_both_ways(sparse, decode, targets):
    """But for long answers under dense decode, which as a user are a further piece of prompt."""
    llama = cases.model()
    config = replace(cases.CONFIG, sparse=sparse, decode=decode, last=8)
    prompts = cases.prompts(6, targets=targets)
    router = cases.divided_router(llama, prompts, config)
    assert serves(config)
    with AsUser.of(llama, router=router, lowering="eager") as run:
        expected = run(prompts)
        with torch.compiler.set_stance("fail_on_recompile"):
            run(cases.prompts(6, shortest=100, targets=targets + 2))
    with AsUser.of(llama, routes=[0, 1, 0], config=config, lowering="eager") as run:
        pinned = run(prompts)
    with OneGraph.of(llama, config, lowering="eager") as graph:
        found, of_pattern = graph.routed(router)(prompts), graph.pattern([0, 1, 0])(prompts)
    assert 0 < found.full.double().mean() < 1, "every row takes the same routes"
    assert torch.equal(found.full, expected.full)
    if targets > STEPS and decode == "dense":
        assert (of_pattern.loss - pinned.loss).abs().min() > 1e-3
    else:
        assert_same(found, expected)
        assert_same(of_pattern, pinned)


def test_short_answers_are_what_generation_says():
    """In a mode that only inference has: a call a token."""
    llama = cases.model()
    config = replace(cases.CONFIG, sparse="xattention", block=16)
    router = cases.divided_router(llama, PROMPTS, config)
    said = _decoded(llama, router, [prompt.prompt for prompt in PROMPTS], 6)
    generated = [Prompt(p.prompt, tokens) for p, tokens in zip(PROMPTS, said, strict=True)]
    with AsUser.of(llama, router=router, lowering="eager") as run:
        found = run(generated)
    assert 0 < found.full.double().mean() < 1
    assert found.exact.all()


def test_one_compile_serves_every_router_and_pattern():
    llama = cases.model()
    router = cases.divided_router(llama, PROMPTS)
    with OneGraph.of(llama, cases.CONFIG, lowering="eager") as graph:
        graph.pattern([1, 1, 1])(PROMPTS)
        with torch.compiler.set_stance("fail_on_recompile"):
            longer = cases.prompts(6, shortest=120)
            alike = [graph.pattern(p)(longer) for p in ([0, 0, 0], [1, 0, 0])]
            alike.append(graph.routed(router)(PROMPTS))
            alike.append(graph.routed(FluxRouter.from_model(llama, cases.CONFIG))(PROMPTS))
    assert len({tuple(scores.loss.tolist()) for scores in alike}) == 4
    assert alike[-1].full.all(), "an untrained router is full attention"


def test_the_model_is_left_as_it_was():
    llama = cases.model().train()
    served = FluxRouter.from_model(llama, cases.CONFIG)
    fluxcompile.attach(llama, served)
    for way in (
        AsUser.of(llama, routes="sparse", config=cases.CONFIG, lowering="eager"),
        OneGraph.of(llama, cases.CONFIG, lowering="eager"),
    ):
        with way:
            assert not llama.training
        assert llama.training
        assert fluxcompile.attachment.attachment_of(llama).router is served
        assert all(parameter.requires_grad for parameter in llama.parameters())


def test_a_model_that_falls_back_to_eager_is_not_judged():
    llama = cases.model()
    router = FluxRouter.from_model(llama, cases.CONFIG)
    with AsUser.of(llama, router=router, lowering="eager") as run:
        run(PROMPTS)
        with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(Exception, match="limit"):
            run(cases.prompts(2))
        with torch.compiler.set_stance("force_eager"), pytest.raises(RouterError, match="none"):
            run(PROMPTS)


def test_what_does_not_fit_is_refused():
    for config in (FluxConfig(sparse="power"), FluxConfig(retrieval="xattention")):
        with pytest.raises(ConfigError, match="triangle"), OneGraph.of(cases.model(), config):
            pass
    with pytest.raises(DataError, match="at most 256"):
        check_lengths(cases.model(), [200, 257])
    llama = cases.model()
    with OneGraph.of(llama, cases.CONFIG, lowering="eager") as graph:
        with pytest.raises(RouterError, match="3 entries, got 2"):
            graph.pattern([1, 0])
        other = FluxRouter.from_model(llama, fluxcompile.FluxConfig(sink=5))
        with pytest.raises(RouterError, match=r"sink=4.*sink=5"):
            graph.routed(other)
    llama.compile(backend="flux")
    with pytest.raises(TrainingError, match="compile"), AsUser.of(llama, routes="full"):
        pass
