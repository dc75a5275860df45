"""A model compiled for training computes the eager mixture, and its gradients."""

import itertools

import pytest
import torch

from fluxcompile import soft_routes
from tests.parity.models import forced_router, prompt
from tests.training import cases
from tests.training.cases import LONG, SHORT


@pytest.mark.parametrize(
    ("kind", "length", "padding"),
    [
        *itertools.product(["llama"], (SHORT, LONG), ("none", "left", "right")),
        ("qwen3", SHORT, "right"),
        ("qwen3", LONG, "left"),
    ],
)
def test_loss_shares_and_gradients(kind, length, padding):
    case = cases.compiled(cases.trainable(kind))
    batch = prompt(3, length, padding)
    noise = cases.noise_for(case.router, 3)
    got = cases.compiled_step(case, batch, noise)
    cases.assert_same(got, cases.eager_step(case, batch, noise))
    assert ((got.shares > 0.02) & (got.shares < 0.98)).any(dim=0).all(), "shares too hard to tell"


@pytest.mark.parametrize("kind", ["llama-eager", "mistral"])
def test_other_attentions(kind):
    """Softmax written out, and a sliding window wider than the local one."""
    case = cases.compiled(cases.trainable(kind))
    batch = prompt(2, LONG, "left")
    got = cases.compiled_step(case, batch, None)
    cases.assert_same(got, cases.eager_step(case, batch, None))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("sparse", "decode"),
    [("triangle", "sparse"), ("triangle", "dense"), ("streaming", "dense")],
)
def test_answers_are_decoded(sparse, decode, padding):
    """The prompt's last queries are dense, not the row's; what follows is as decoding has it."""
    case = cases.compiled(cases.trainable("llama", sparse=sparse, decode=decode, last=5))
    batch, noise = prompt(3, LONG, padding), cases.noise_for(case.router, 3)
    losses = []
    for prompts in (None, torch.tensor([3, LONG - 12, 10_000])):  # short, within, beyond the row
        got = cases.compiled_step(case, batch, noise, prompts)
        cases.assert_same(got, cases.eager_step(case, batch, noise, prompt_length=prompts))
        losses.append(got.loss)
    assert (losses[0] - losses[1]).abs() > 1e-6


@pytest.mark.parametrize("hardness", [0.3, 1.0])
def test_hardened(hardness):
    """Nearer to hard routes forward, the slope of the shares backward; one graph for all."""
    case = cases.compiled(cases.trainable("llama"))
    batch, noise = prompt(3, LONG, "left"), cases.noise_for(case.router, 3)
    soft = cases.compiled_step(case, batch, noise)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = cases.compiled_step(case, batch, noise, hardness=hardness)
    cases.assert_same(got, cases.eager_step(case, batch, noise, hardness=hardness))
    torch.testing.assert_close(got.shares[:, 0], soft.shares[:, 0])  # themselves they stay soft
    assert (got.loss - soft.loss).abs() > 1e-6


def test_padded_row_equals_its_unpadded_run():
    case = cases.compiled(cases.trainable("qwen3"), dynamic=True)
    batch = prompt(3, LONG, "left")
    with soft_routes(case.router) as soft, torch.no_grad():
        padded = case.model(batch.ids, attention_mask=batch.mask, use_cache=False,
                            position_ids=batch.positions).logits  # fmt: skip
        shares = soft.shares()
        for row in range(3):
            alone = case.model(batch.row(row).ids, use_cache=False).logits
            keep = batch.valid[row].bool()
            torch.testing.assert_close(padded[row, keep], alone[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(soft.shares()[0], shares[row])


def test_finite_differences():
    """Along the gradient of each parameter, in a model in fp64 (the routers are fp32 always)."""
    case = cases.compiled(cases.trainable("qwen3"))
    batch, noise = prompt(2, LONG, "left"), cases.noise_for(cases.trainable("qwen3").router, 2)
    gradients = cases.compiled_step(case, batch, noise).gradients

    @torch.no_grad()
    def value():
        with soft_routes(case.router, temperature=cases.TEMPERATURE, noise=noise) as soft:
            return cases.objective(cases.lm_loss(case.model, batch), soft.shares()).item()

    for name, parameter in case.router.named_parameters():
        gradient = gradients[name]
        slope = gradient.norm().item()
        # A step that moves the objective by far more than the rounding of a share.
        step = (gradient / slope) * min(2e-4 / slope, 0.02)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step)
                values.append(value())
                parameter.sub_(sign * step)
        found = (values[0] - values[1]) / (2 * step.norm().item())
        assert found == pytest.approx(slope, rel=5e-3), name


def test_only_the_router_gets_gradients():
    case = cases.compiled(cases.trainable("llama"))
    cases.compiled_step(case, prompt(2, LONG, "left"), None)
    assert all(p.grad is None for p in case.model.parameters())
    assert all(p.grad is not None for p in case.router.parameters())


def test_frozen_now_trained_later():
    """The graph is compiled once, whichever of the router's parameters are trained."""
    case = cases.compiled(cases.trainable("llama"))
    batch = prompt(2, LONG, "none")
    parameters = list(case.router.parameters())
    for p in parameters:
        p.requires_grad_(False)
    assert not cases.lm_loss(case.model, batch).requires_grad
    for p in parameters:
        p.requires_grad_(True)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = cases.compiled_step(case, batch, None)
    cases.assert_same(got, cases.eager_step(case, batch, None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_settings_and_weights_are_inputs(dynamic):
    """No recompile for another temperature, other noise, none at all, or after a training step."""
    case = cases.compiled(cases.trainable("llama"), dynamic=dynamic)
    batch = prompt(2, LONG, "left")
    cases.lm_loss(case.model, batch)
    seen = []
    with torch.compiler.set_stance("fail_on_recompile"):
        for temperature, noise in [(1.5, None), (1.0, cases.noise_for(case.router, 2)), (1, None)]:
            with soft_routes(case.router, temperature=temperature, noise=noise) as soft:
                loss = cases.lm_loss(case.model, batch)
            loss.backward()
            seen.append(soft.shares().detach())
            expected = cases.Mixture(case.router, temperature, noise)
            with cases.eager_mixture(case.model, expected), torch.no_grad():
                case.model.forward(batch.ids, attention_mask=batch.mask, use_cache=False)
            torch.testing.assert_close(soft.shares().detach(), expected.shares())
            with torch.no_grad():
                for p in case.router.parameters():
                    p.sub_(0.05 * p.grad)
    assert len({tuple(s.flatten().tolist()) for s in seen}) == 3


def test_other_batches_and_lengths_without_recompiling():
    case = cases.compiled(cases.trainable("llama"), dynamic=True)
    cases.compiled_step(case, prompt(2, LONG, "left"), None)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (prompt(3, LONG + 9, "left"), prompt(4, LONG - 7, "left", seed=1)):
            noise = cases.noise_for(case.router, batch.ids.shape[0])
            got = cases.compiled_step(case, batch, noise)
            cases.assert_same(got, cases.eager_step(case, batch, noise))


@pytest.mark.parametrize("full", [True, False], ids=["full", "sparse"])
def test_hard_shares_equal_pinned_routes(full):
    """Logits far apart: bit for bit what full attention, or sparse attention, gives."""
    case = cases.trainable("qwen3", dtype=torch.float32)
    forced = forced_router(case.model, full).state_dict()
    case.router.load_state_dict(forced)
    with torch.no_grad():
        for layer in case.router.layers:
            layer.head[-1].bias.mul_(30.0)
    batch = prompt(2, LONG, "left")

    def logits():
        return case.model(batch.ids, attention_mask=batch.mask, use_cache=False).logits

    cases.compiled(case)
    with torch.no_grad():
        got = logits()
        torch._dynamo.reset()
        options = {"lowering": "eager", "routes": "full" if full else "sparse",
                   "config": case.router.config}  # fmt: skip
        case.model.compile(backend="flux", options=options)
        assert torch.equal(got, logits())


def test_loss_inside_the_graph():
    case = cases.trainable("llama")
    torch._dynamo.reset()
    case.model.compile(
        backend="flux", fullgraph=True, options={"mode": "train", "lowering": "aot_eager"}
    )
    batch, noise = prompt(2, LONG, "left"), cases.noise_for(case.router, 2)
    with soft_routes(case.router, temperature=cases.TEMPERATURE, noise=noise) as soft:
        loss = case.model(batch.ids, attention_mask=batch.mask, labels=cases.labels_of(batch),
                          use_cache=False).loss  # fmt: skip
    got = cases._step(case, loss, soft.shares())
    cases.assert_same(got, cases.eager_step(case, batch, noise))


def test_base_model():
    """The decoder without its head, compiled by itself."""
    case = cases.trainable("llama")
    torch._dynamo.reset()
    decoder = case.model.model
    decoder.compile(backend="flux", fullgraph=True, options={"mode": "train", "lowering": "eager"})
    batch = prompt(2, LONG, "left")
    noise = cases.noise_for(case.router, 2)
    with soft_routes(case.router, temperature=cases.TEMPERATURE, noise=noise) as soft:
        hidden = decoder(batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    loss = cases.next_token_loss(case.model.lm_head(hidden), batch)
    got = cases._step(case, loss, soft.shares())
    decoder._compiled_call_impl = None
    cases.assert_same(got, cases.eager_step(case, batch, noise))


def test_several_graphs_and_a_backward_after_the_block():
    """A graph break behind every layer's attention; shares gather from all of the graphs."""
    case = cases.trainable("llama")
    for layer in case.model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    cases.compiled(case)
    batch, noise = prompt(2, LONG, "left"), cases.noise_for(case.router, 2)
    for _ in range(2):
        got = cases.compiled_step(case, batch, noise)
        cases.assert_same(got, cases.eager_step(case, batch, noise))


def test_two_models_take_turns():
    """Blocks of two routers may be nested; each model finds its own."""
    first, second = cases.trainable("llama"), cases.trainable("qwen3")
    cases.compiled(first)
    cases.compiled(second)
    batch = prompt(2, LONG, "none")
    with soft_routes(first.router, temperature=4.0) as a, soft_routes(second.router) as b:
        cases.lm_loss(first.model, batch)
        cases.lm_loss(second.model, batch)
    alone = cases.Mixture(first.router, 4.0)
    with cases.eager_mixture(first.model, alone):
        first.model.forward(batch.ids, use_cache=False)
    torch.testing.assert_close(a.shares(), alone.shares())
    assert not torch.equal(a.shares(), b.shares())
