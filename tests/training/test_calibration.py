"""Means and deviations of what routers read, measured over data."""

from dataclasses import replace

import pytest
import torch

from fluxcompile import FluxRouter, train_router
from fluxcompile.errors import TrainingError
from fluxcompile.training import calibration
from fluxcompile.training.batching import collate
from fluxcompile.training.calibration import calibrate, is_calibrated
from fluxcompile.training.examples import prepare
from fluxcompile.training.tasks import resolve_tasks
from tests.router_features import features
from tests.training.tiny import CONFIG, QUICK, largest_difference, tiny_data, tiny_model

STANDARDISED = replace(
    CONFIG, prefix_size=6, suffix_size=3, segments="separate", heads="each", standardize=True
)


def examples(rows=6, prompt_length=20):
    data = [row | {"prompt_length": prompt_length + i} for i, row in enumerate(tiny_data(rows))]
    return prepare(data, tasks=resolve_tasks())


def read_by_hooks(model, config, rows):
    """fp32 ``[rows, layers, F]``: an eager run under full attention, one row at a time."""
    queries, found = [], []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _m, _i, out: queries.append(out))
        for layer in model.model.layers
    ]
    for example in rows:
        queries.clear()
        with torch.no_grad():
            model(example.input_ids[None])
        valid = [1] * len(example)
        by_head = [query[0].unflatten(-1, (-1, 16)) for query in queries]
        found.append(
            torch.stack([features(q, valid, config, example.prompt_length) for q in by_head])
        )
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def assert_measured(router, read):
    for i, layer in enumerate(router.layers):
        torch.testing.assert_close(layer.feature_mean, read[:, i].mean(0), rtol=1e-4, atol=1e-6)
        expected = read[:, i].std(0, correction=0)
        torch.testing.assert_close(layer.feature_deviation, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [1, 4])
def test_moments_are_those_of_eager_full_attention(size):
    model, rows = tiny_model(), examples()
    router = FluxRouter.from_model(model, STANDARDISED)
    with torch.no_grad():
        for layer in router.layers:  # however it routes
            layer.head[-1].bias.copy_(torch.tensor([9.0, 0.0]))
    before = {name: p.clone() for name, p in router.named_parameters()}
    batches = [collate(rows[i : i + size], 0) for i in range(0, len(rows), size)]
    calibrate(model, router, batches, lowering="eager")
    assert is_calibrated(router)
    assert_measured(router, read_by_hooks(model, STANDARDISED, rows))
    assert all(torch.equal(p, before[name]) for name, p in router.named_parameters())
    assert all(p.grad is None for p in router.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_deviations_have_a_floor():
    """The beginning of all prompts is the same: no rounding there is blown up."""
    model, rows = tiny_model(), examples()
    for example in rows:
        example.input_ids[:6] = torch.arange(3, 9)
    router = FluxRouter.from_model(model, STANDARDISED)
    calibrate(model, router, [collate(rows, 0)], lowering="eager")
    read = read_by_hooks(model, STANDARDISED, rows)
    for i, layer in enumerate(router.layers):
        same, differing = layer.feature_deviation.chunk(2)
        deviation, mean = read[:, i].std(0, correction=0), read[:, i].mean(0)
        floor = (
            calibration.LEAST_OF_DEVIATION * deviation.square().mean().sqrt()
            + calibration.LEAST_OF_MEAN * mean.square().mean().sqrt()
        )
        torch.testing.assert_close(same, floor.expand_as(same), rtol=1e-3, atol=0)
        assert (differing > floor).all()


def test_what_cannot_be_calibrated():
    model = tiny_model()
    with pytest.raises(TrainingError, match=r"FluxConfig.standardize, got False"):
        calibrate(model, FluxRouter.from_model(model, CONFIG), [], lowering="eager")
    with pytest.raises(TrainingError, match="at least one row, got none"):
        calibrate(model, FluxRouter.from_model(model, STANDARDISED), [], lowering="eager")


def test_training_calibrates_once_and_keeps_it(tmp_path, monkeypatch):
    settings = QUICK | {"config": STANDARDISED, "save_steps": 3}
    router = train_router(tiny_model(), tiny_data(), output_dir=tmp_path, **settings)
    assert is_calibrated(router)
    assert all((layer.feature_deviation > 0).all() for layer in router.layers)
    saved = FluxRouter.from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(saved.layers[1].feature_mean, router.layers[1].feature_mean)

    def refuse(*_, **__):
        raise AssertionError("calibrated again")

    monkeypatch.setattr("fluxcompile.training.trainee.calibrate", refuse)
    checkpoint = {"resume_from_checkpoint": str(tmp_path / "checkpoint-3")}
    resumed = train_router(
        tiny_model(), tiny_data(), output_dir=tmp_path / "resumed", **settings, **checkpoint
    )
    assert largest_difference(resumed, router) == 0
    assert torch.equal(resumed.layers[0].feature_mean, router.layers[0].feature_mean)
    more = settings | {"config": None, "max_steps": 1}
    mean = router.layers[0].feature_mean.clone()
    train_router(tiny_model(), tiny_data(), router=router, **more)
    assert torch.equal(router.layers[0].feature_mean, mean)


def test_untrained_bias_is_an_argument():
    settings = QUICK | {"max_steps": 1, "learning_rate": 0.0}
    router = train_router(tiny_model(), tiny_data(), full_bias=1.5, **settings)
    assert router.layers[0].head[-1].bias.tolist() == [0.0, 1.5]
