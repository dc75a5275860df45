"""``fluxcompile train``, ``retarget`` and ``convert``, from files to a router folder."""

import json

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from fluxcompile import FluxRouter
from fluxcompile.cli import app
from fluxcompile.errors import ConfigError, DataError
from fluxcompile.training import command
from tests.router_models import random_router
from tests.test_router_published import CONFIG, router_tensors
from tests.training.tiny import largest_difference, tiny_data, tiny_model


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path):
    """A saved model and a JSONL file of token ids."""
    tiny_model().save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in tiny_data(8)) + "\n\n")
    return tmp_path


def train(files, *more: object):
    return run(
        "train", files / "model", "--data", files / "data.jsonl", "--output", files / "router",
        "--sink", 4, "--local", 8, "--steps", 2, "--batch-size", 4, "--micro-batch", 2,
        "--lowering", "eager", "--cpu", "--set", "report_to=none", "--set", "disable_tqdm=true",
        *more,
    )  # fmt: skip


def test_train_writes_a_router_and_resumes(files):
    result = train(files, "--task", "retrieval=0.3", "--set", "save_steps=1",
                   "--config", "suffix_size=5", "--config", "segments=separate")  # fmt: skip
    assert result.exit_code == 0, result.output
    router = FluxRouter.from_pretrained(files / "router")
    assert (router.config.sink, router.config.local) == (4, 8)
    assert (router.config.suffix_size, router.config.segments) == (5, "separate")
    card = (files / "router" / "README.md").read_text()
    assert "| retrieval | 0.3 |" in card
    assert "Data: rows of `data.jsonl`." in card
    assert "trained against" not in card
    again = train(files, "--task", "retrieval=0.3", "--resume",
                  "--config", "suffix_size=5", "--config", "segments=separate")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert largest_difference(FluxRouter.from_pretrained(files / "router"), router) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--set", "save_steps"), "NAME=VALUE"),
        (("--set", "optimiser=sgd"), "unknown 'optimiser'"),
        (("--task", "retrieval=high"), "retrieval"),
        (("--data", "nothing.jsonl"), "nothing.jsonl"),
        (("--batch-size", 3), "batch_size"),
        (("--resume",), "checkpoint-N"),
        (("--config", "prefix=3"), "unknown ['prefix']"),
        (("--config", "suffix_size=-1"), "suffix_size"),
        (("--mixture", "split=heldout"), "--mixture"),
        (("--data", "builtin"), "tokenizer"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_what_is_wrong_is_said(files, more, message):
    result = train(files, *more)
    assert result.exit_code == 2
    assert message in result.output


def test_a_model_that_is_not_there_is_refused(files, tmp_path):
    result = run(
        "train", tmp_path / "nowhere", "--data", files / "data.jsonl", "--output", tmp_path / "out"
    )
    assert result.exit_code == 2
    assert "nowhere" in result.output


def test_jsonl_errors_name_the_line(tmp_path):
    file = tmp_path / "data.jsonl"
    for text, message in (('{"a": 1}\n{"a"', r":2: .*bad JSON"), ("[1]", r":1: .*list")):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            command.read_jsonl(file)


def test_settings_are_json_or_words():
    pairs = command._pairs("--set", ["a=1", "b=x", 'c={"d": 2}', "e=true", "f=1e-3"])
    assert pairs == {"a": 1, "b": "x", "c": {"d": 2}, "e": True, "f": 1e-3}
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        command._pairs("--set", ["=1"])


def test_convert_takes_a_published_router(tmp_path):
    checkpoint = tmp_path / "Qwen3-4B-FA-SSA"
    checkpoint.mkdir()
    router = random_router(layers=3)
    (checkpoint / "config.json").write_text(json.dumps(CONFIG))
    safetensors.torch.save_file(router_tensors(router), checkpoint / "model.safetensors")
    result = run("convert", checkpoint, tmp_path / "router")
    assert result.exit_code == 0, result.output
    assert "3 layers" in result.output
    published = FluxRouter.from_pretrained(tmp_path / "router")
    assert published.config.sink == 128
    for _ in range(2):
        assert run("convert", checkpoint, tmp_path / "biased", "--bias", "0.5").exit_code == 0
    biased = FluxRouter.from_pretrained(tmp_path / "biased")
    assert largest_difference(biased, published.biased(0.5)) == 0
    assert (tmp_path / "biased" / "README.md").read_text().count("+0.5 was added") == 1
    assert run("convert", tmp_path / "nothing", tmp_path / "other").exit_code == 2


def test_convert_stores_a_router_in_half_the_size(tmp_path):
    router = random_router(layers=3, base_model="org/base")
    router.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("how it was trained")
    (tmp_path / "run" / "checkpoint-3").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("of another router")
    result = run("convert", tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "out" / "README.md").read_text() == "how it was trained"
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    converted = FluxRouter.from_pretrained(tmp_path / "out")
    assert converted.base_model == "org/base"
    assert 0 < largest_difference(converted, router) < 0.02


def test_convert_with_a_bias_says_so_on_the_card(tmp_path):
    router = random_router()
    router.save_pretrained(tmp_path / "run")
    result = run("convert", tmp_path / "run", tmp_path / "out", "--bias", "-0.5")
    assert result.exit_code == 0, result.output
    converted = FluxRouter.from_pretrained(tmp_path / "out")
    assert largest_difference(converted, router.biased(-0.5)) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.endswith("\n\nAfter training, -0.5 was added to every layer's logit of full "
                         "attention.\n")  # fmt: skip


def test_retarget_on_a_gpu_that_is_not_there(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    random_router().save_pretrained(files / "router")
    result = run("retarget", files / "router", files / "out", "--task", "retrieval=0.5",
                 "--device", "cuda")  # fmt: skip
    assert result.exit_code == 2
    assert "expected a machine with a GPU" in result.output


def test_retarget_writes_a_router_and_says_so_on_the_card(files):
    assert train(files).exit_code == 0
    card = (files / "router" / "README.md").read_text()
    arguments = (
        "retarget", files / "router", files / "moved", "--model", files / "model",
        "--data", files / "data.jsonl", "--lowering", "eager", "--device", "cpu",
    )  # fmt: skip
    assert run(*arguments, "--task", "retrieval").exit_code == 2
    result = run(*arguments, "--task", "retrieval=1.0", "--task", "holistic=1.0")
    assert result.exit_code == 0, result.output
    assert "retrieval: 1.000 of the layers sparse" in result.output
    router, moved = (FluxRouter.from_pretrained(files / name) for name in ("router", "moved"))
    assert largest_difference(moved, router) > 0
    moved_card = (files / "moved" / "README.md").read_text()
    assert moved_card.startswith(card)
    assert "on rows of `data.jsonl`" in moved_card
    assert moved_card.endswith("| retrieval | 1.0 | 1.000 |\n| holistic | 1.0 | 1.000 |\n")


def test_convert_in_place(tmp_path):
    router = random_router()
    router.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_bytes()
    assert run("convert", tmp_path, tmp_path, "--dtype", "bfloat16").exit_code == 0
    assert (tmp_path / "README.md").read_bytes() == card
    assert 0 < largest_difference(FluxRouter.from_pretrained(tmp_path), router) < 0.02
