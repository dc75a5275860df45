"""The doctor's self-test passes where the compiler is right, and fails where it is not."""

import pytest
import torch

from fluxcompile.doctor import Status, self_test


@pytest.mark.slow  # test_command.py runs it in any case
@pytest.mark.parametrize("routes", ["full", "sparse"])
def test_a_right_compiler_passes(routes):
    finding = self_test.self_test(routes, "aot_eager")
    assert finding.status is Status.OK, finding
    assert "aot_eager" in finding.found


@pytest.mark.gpu
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("routes", ["full", "sparse"])
def test_on_a_gpu(routes, lowering):
    finding = self_test.self_test(routes, lowering)
    assert finding.status is Status.OK, finding
    assert "cuda" in finding.found


def test_the_two_routes_can_be_told_apart():
    """Sparse logits in place of full ones, and the other way round, would be noticed."""
    model, ids = self_test.one_layer("cpu"), self_test.prompt("cpu")
    mask = self_test.sparse_mask("cpu")
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        sparse = model(ids, attention_mask=mask, use_cache=False).logits
    assert float((full - sparse).abs().max()) > 100 * self_test.ROUNDING


@pytest.mark.parametrize("routes", ["full", "sparse"])
def test_the_wrong_route_fails(monkeypatch, routes):
    right = self_test.compiled_logits
    other = {"full": "sparse", "sparse": "full"}[routes]
    monkeypatch.setattr(
        self_test,
        "compiled_logits",
        lambda model, ids, _, lowering: right(model, ids, other, lowering),
    )
    finding = self_test.self_test(routes, "eager")
    assert finding.status is Status.FAIL
    assert "expected at most" in finding.found
    assert "report versions" in finding.advice


@pytest.mark.parametrize("wrong", [float("nan"), 0.01])
def test_wrong_logits_fail(monkeypatch, wrong):
    def nearly(model, ids, *_):
        return model(ids, use_cache=False).logits + wrong

    monkeypatch.setattr(self_test, "compiled_logits", nearly)
    finding = self_test.self_test("full", "eager")
    assert finding.status is Status.FAIL
    assert "differs from eager by" in finding.found


def test_an_error_is_a_failed_line(monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel\n  image is available")

    monkeypatch.setattr(self_test, "compiled_logits", broken)
    finding = self_test.self_test("sparse", "eager")
    assert finding.status is Status.FAIL
    assert finding.found == "RuntimeError: no kernel image is available"
    assert "--lowering eager" in finding.advice
