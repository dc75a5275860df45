"""Whole runs on a tiny model: what they leave alone, what they write, how they stop and go on."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxcompile import FluxConfig, FluxRouter, attach, detach
from fluxcompile.attachment import attachment_of
from fluxcompile.errors import ConfigError, DataError, FluxError, RouterError, TrainingError
from fluxcompile.training import train_router
from fluxcompile.training.batching import collate
from fluxcompile.training.trainer import RouterTrainer
from tests.training.tiny import CONFIG, QUICK, largest_difference, tiny_data, tiny_model


def state_of(directory: Path) -> dict:
    return json.loads((directory / "trainer_state.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run: model before and after, router, output directory."""
    directory = tmp_path_factory.mktemp("run")
    model = tiny_model().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    router = train_router(
        model, tiny_data(), output_dir=directory, save_steps=3, logging_steps=1, **QUICK
    )
    return model, before, router, directory


def test_backbone_is_left_as_it_was(finished):
    model, before, _, _ = finished
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.training
    assert all(module.training for module in model.modules())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name != "lm_head.weight"}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert attachment_of(model) is None
    assert model._compiled_call_impl is None


def test_router_was_trained_and_saved(finished):
    model, _, router, directory = finished
    assert router.config == CONFIG
    assert not router.training
    saved = FluxRouter.from_pretrained(directory)
    assert largest_difference(saved, router) == 0
    new = FluxRouter.from_model(model, CONFIG)
    assert largest_difference(router.layers[0].head[-1], new.layers[0].head[-1]) > 0
    card = (directory / "README.md").read_text()
    for line in ("| `learning_rate` | 0.0005 |", "| `max_grad_norm` | 1.0 |", "for\n6 steps"):
        assert line in card
    assert "| holistic | 1.0 | 4." in card


def test_checkpoints_hold_the_router_and_not_the_backbone(finished):
    _, _, router, directory = finished
    folders = sorted(path.name for path in directory.iterdir() if path.is_dir())
    assert folders == ["checkpoint-3", "checkpoint-6"]
    last = directory / "checkpoint-6"
    assert largest_difference(FluxRouter.from_pretrained(last), router) == 0
    weights = sum(parameter.nbytes for parameter in router.parameters())
    size = sum(file.stat().st_size for file in last.iterdir())
    assert size < 3 * weights + 2**16


def test_logs_say_what_each_task_does(finished):
    *_, directory = finished
    logs = state_of(directory / "checkpoint-6")["log_history"]
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4, 5, 6]
    assert logs[0]["temperature"] == 1.5
    assert logs[-1]["temperature"] == 1.0
    for name in ("lm_loss", "sparsity", "routed_sparsity", "lambda1", "lambda2"):
        for task in ("retrieval", "holistic"):
            assert math.isfinite(logs[-1][f"{name}/{task}"])
    assert logs[-1]["tokens_per_second"] > 0
    assert logs[-1]["peak_memory_gib"] > 0
    assert logs[-1]["lambda2/holistic"] > logs[1]["lambda2/holistic"] > 0


def test_a_resumed_run_takes_the_same_way(finished, tmp_path):
    *_, router, directory = finished
    resumed = train_router(
        tiny_model(),
        tiny_data(),
        output_dir=tmp_path,
        resume_from_checkpoint=str(directory / "checkpoint-3"),
        save_steps=3,
        logging_steps=1,
        **QUICK,
    )
    assert largest_difference(resumed, router) == 0
    ours, theirs = (state_of(d / "checkpoint-6") for d in (tmp_path, directory))
    names = ("loss", "lm_loss", "sparsity/holistic", "lambda2/retrieval", "grad_norm")
    for one, other in zip(ours["log_history"], theirs["log_history"], strict=True):
        assert [one[name] for name in names] == [other[name] for name in names]


def test_rows_of_similar_length_run_together(monkeypatch):
    """Whatever their number, a step has the same rows and ends in the same router."""
    seen: list[list[int]] = []

    def noting(examples, *args, **kwargs):
        seen.append([len(example) for example in examples])
        return collate(examples, *args, **kwargs)

    monkeypatch.setattr("fluxcompile.training.train.collate", noting)
    data = [
        row | {"input_ids": row["input_ids"] * (1 + i % 3)} for i, row in enumerate(tiny_data())
    ]
    steps, routers = [], []
    for rows in (1, 4):
        seen.clear()
        routers.append(
            train_router(
                tiny_model(), data, **QUICK | {"max_steps": 3, "per_device_train_batch_size": rows}
            )
        )
        flat = [n for batch in seen for n in batch]
        steps.append([flat[i : i + 4] for i in range(0, len(flat), 4)])
    assert steps[0] == steps[1] == [sorted(step) for step in steps[0]]
    assert len({n for step in steps[0] for n in step}) > 5
    assert largest_difference(*routers) < 1e-6


def test_a_checkpoint_of_another_run_is_refused(finished, tmp_path):
    *_, directory = finished
    again = {"output_dir": tmp_path, "resume_from_checkpoint": str(directory / "checkpoint-3")}
    with pytest.raises(TrainingError, match="targets"):
        train_router(tiny_model(), tiny_data(), tasks={"retrieval": 0.3}, **again, **QUICK)
    one_task = [row for row in tiny_data() if row["task"] == "holistic"]
    with pytest.raises(TrainingError, match="tasks"):
        train_router(tiny_model(), one_task, **again, **QUICK)
    with pytest.raises(TrainingError, match="checkpoint-N"):
        train_router(
            tiny_model(), tiny_data(), output_dir=tmp_path, resume_from_checkpoint=True, **QUICK
        )


def test_a_killed_save_leaves_no_checkpoint(monkeypatch, tmp_path):
    def killed(self, output_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(RouterTrainer, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train_router(tiny_model(), tiny_data(), output_dir=tmp_path, save_steps=1, **QUICK)
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name] == []


def test_nan_stops_before_the_step_and_names_the_example(tmp_path):
    model = tiny_model()
    poisoned = 60  # a token that only example 5 has
    data = [
        {**row, "input_ids": [min(token, 59) for token in row["input_ids"]]} for row in tiny_data()
    ]
    data[5]["input_ids"][20] = poisoned
    with torch.no_grad():
        model.model.embed_tokens.weight[poisoned] = math.nan
    with pytest.raises(TrainingError, match=r"step \d: .* finite loss.*examples: 5 \(holistic\)"):
        train_router(model, data, output_dir=tmp_path, save_steps=1, **QUICK)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        FluxRouter.from_pretrained(checkpoint)  # refuses NaN
    assert attachment_of(model) is None


def test_sparsity_moves_to_the_targets_task_by_task(tmp_path):
    model = tiny_model(initializer_range=0.3)  # queries that differ with the tokens
    settings = QUICK | {
        "max_steps": 80,
        "learning_rate": 5e-3,
        "multiplier_learning_rate": 0.1,
        "multiplier_init": 3.0,
        "warmup_steps": 0.1,
        "per_device_train_batch_size": 4,
        "logging_steps": 20,
    }
    data = tiny_data(tokens_tell_tasks=True)
    train_router(model, data, tasks={"retrieval": 0.25}, output_dir=tmp_path, **settings)
    first, *_, last = state_of(tmp_path / "checkpoint-80")["log_history"]
    assert first["sparsity/holistic"] < 0.2
    # Bounds with room: rounding alone leads to another trajectory of the same kind.
    assert last["sparsity/holistic"] > 0.45
    assert 0.1 < last["sparsity/retrieval"] < 0.5
    assert last["sparsity/holistic"] > last["sparsity/retrieval"] + 0.1
    assert last["lambda1/holistic"] == 0, "never too sparse: no price on sparsity"
    assert last["lambda1/retrieval"] > 0.5


def test_training_goes_on_from_a_router_and_keeps_what_was_attached():
    model = tiny_model()
    mine = FluxRouter.from_model(model, CONFIG)
    attached = attach(model, mine).router
    start = FluxRouter.from_model(model, CONFIG)
    settings = QUICK | {"config": None, "max_steps": 1, "learning_rate": 1.0, "warmup_steps": 0}
    assert train_router(model, tiny_data(), router=start, **settings) is start
    assert attachment_of(model).router is attached
    detach(model)
    with pytest.raises(ConfigError, match="config"):
        train_router(model, tiny_data(), router=start, **QUICK | {"config": FluxConfig()})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"learning_rates": 1.0}, ConfigError, r"unknown 'learning_rates'.*"),
        ({"batch_size": 3}, ConfigError, "multiple of 1 processes"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"certainty": 0.5}, ConfigError, "certainty: expected 0 without distillation"),
        ({"certainty": 2, "distillation": 1.0}, ConfigError, "certainty"),
        ({"max_steps": -1}, ConfigError, "max_steps"),
        ({"lowering": "nvcc"}, ConfigError, "lowering"),
        ({"temperature_anneal": 2}, ConfigError, "temperature_anneal"),
        ({"activation_memory_budget": 0}, ConfigError, "activation_memory_budget"),
        ({"fp16": True}, ConfigError, "bf16"),
        ({"fsdp": True}, ConfigError, "shard_backbone"),
        ({"gradient_checkpointing": True}, ConfigError, "activation_memory_budget"),
        ({"gradient_accumulation_steps": 4}, ConfigError, "follows from batch_size"),
        ({"learning_rate": math.nan}, ConfigError, "learning_rate"),
        ({"save_strategy": "now"}, ConfigError, "now"),
        ({"tasks": {"retrieval": 2.0}}, DataError, "retrieval"),
        ({"min_length": 1000}, FluxError, "1000"),
        ({"resume_from_checkpoint": True}, ConfigError, "output_dir"),
        ({"config": replace(CONFIG, sparse="power")}, ConfigError, "'streaming', 'triangle'"),
        ({"config": replace(CONFIG, retrieval="xattention")}, ConfigError, "full retrieval"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_impossible_arguments_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        train_router(tiny_model(), tiny_data(), **QUICK | changes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "none"),
        ([{"input_ids": [3] * 40, "task": "poetry"}], "poetry"),
        ([{"input_ids": [3] * 5, "task": "holistic"}], "at least 13 tokens"),
        ([{"input_ids": [99] * 40, "task": "holistic"}], "vocab_size"),
    ],
    ids=["empty", "unknown-task", "too-short", "unknown-token"],
)
def test_data_that_cannot_be_trained_on_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        train_router(tiny_model(), data, **QUICK)


def test_models_that_cannot_be_trained_are_refused():
    model = tiny_model()
    other = FluxRouter(CONFIG, layer_names=["model.layers.9.self_attn"], head_dim=16)
    with pytest.raises(RouterError, match=r"layers\.9"):
        train_router(model, tiny_data(), router=other, **QUICK | {"config": None})
    model.compile(backend="flux")
    with pytest.raises(TrainingError, match="not compiled"):
        train_router(model, tiny_data(), **QUICK)
    with torch.device("meta"):
        nowhere = tiny_model()
    with pytest.raises(TrainingError, match="meta"):
        train_router(nowhere, tiny_data(), **QUICK)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("budget", [None, 0.3])
def test_inductor_trains_the_same_router(budget):
    quick = QUICK | {"max_steps": 2}
    expected = train_router(tiny_model(), tiny_data(), **quick)
    settings = quick | {"lowering": "inductor", "activation_memory_budget": budget}
    assert largest_difference(train_router(tiny_model(), tiny_data(), **settings), expected) < 1e-6


def test_distillation_descends_the_divergence_from_full_attention(tmp_path):
    settings = {"output_dir": tmp_path, "logging_steps": 1, "save_steps": 6, **QUICK}
    train_router(tiny_model(initializer_range=0.3), tiny_data(), distillation=1.0, **settings)
    logs = state_of(tmp_path / "checkpoint-6")["log_history"]
    found = [[entry[f"divergence/{t}"] for t in ("retrieval", "holistic")] for entry in logs]
    assert all(
        0 < value < entry["lm_loss"]
        for entry, both in zip(logs, found, strict=True)
        for value in both
    )
    # No penalty at the first step, where λ is 0: all of the objective is the divergence.
    assert logs[0]["loss"] == pytest.approx(sum(found[0]) / 2, rel=1e-4)
    # The same examples and noise: a token counts less, the less likely full attention finds it.
    once = settings | {"max_steps": 1, "save_steps": 1}
    model = tiny_model(initializer_range=0.3)
    train_router(model, tiny_data(), distillation=1.0, certainty=1.0, **once)
    (less,) = state_of(tmp_path / "checkpoint-1")["log_history"]
    assert 0 < less["divergence/retrieval"] < 0.7 * found[0][0]
