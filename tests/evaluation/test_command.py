"""``fluxcompile eval``, and what batches are made of."""

import io

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fluxcompile import FluxConfig, FluxRouter
from fluxcompile.cli import app
from fluxcompile.errors import DataError, FluxError
from fluxcompile.evaluation import Cell, Prompt, command, evaluate
from fluxcompile.evaluation.scoring import Scores
from tests.router_models import tiny_llama
from tests.training.byte_tokenizer import ByteTokenizer


def run(*arguments: str):
    return CliRunner().invoke(app, ["eval", *arguments])


def test_what_cannot_be_evaluated_is_refused_before_a_model_loads(tmp_path):
    result = run("--router", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert "router's folder" in result.output
    result = run("--router", str(tmp_path), "--task", "poems")
    assert result.exit_code == 2
    assert "poems" in result.output
    assert run("--router", str(tmp_path)).exit_code == 2, "an empty folder"


def test_router_against_full_attention(tmp_path, monkeypatch):
    torch.manual_seed(0)
    llama = tiny_llama(
        vocab_size=259, num_hidden_layers=2, max_position_embeddings=2048, initializer_range=0.2
    )
    monkeypatch.setattr(command, "load_model", lambda name, dtype: (llama, ByteTokenizer()))
    router = FluxRouter.from_model(llama, FluxConfig(sink=4, local=16))
    with torch.no_grad():
        router.layers[1].head[-1].bias.copy_(torch.tensor([4.0, 0.0]))
    router.save_pretrained(tmp_path)
    settings = command.EvalSettings(
        "any", tmp_path, lengths=[1024], tasks=["needle", "code"], examples=3, batch=2,
        lowering="eager", device="cpu",
    )  # fmt: skip
    out = io.StringIO()
    results = command.run_eval(settings, Console(file=out, width=120))
    cell = Cell("code", 1024)
    assert list(results["router"]) == [Cell("needle", 1024), cell]
    assert results["router"][cell].full.tolist() == [[True, False]] * 3
    assert results["full"][cell].full.all()
    assert (results["router"][cell].loss != results["full"][cell].loss).all()
    assert "Ω 0.50; 3 held-out prompts each" in out.getvalue()
    assert "sparse layers streaming" in out.getvalue()
    assert "code" in out.getvalue()


def test_without_a_terminal_progress_is_a_line_a_tenth():
    out = io.StringIO()
    with command.counting(Console(file=out), "full", 40) as advance:
        for _ in range(20):
            advance(2)
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("full: 4 of 40 prompts, ")
    assert lines[-1].startswith("full: 40 of 40 prompts, ")


def test_batches_are_all_of_one_size():
    sizes = []

    def engine(prompts):
        sizes.append(len(prompts))
        tokens = torch.tensor([prompt.target[0] for prompt in prompts])
        return Scores(tokens.double(), tokens > 2, torch.ones(len(prompts), 4, dtype=torch.bool))

    cells = {Cell("code", 8): [Prompt((1,), (n,)) for n in range(5)]}
    done = []
    (result,) = evaluate(engine, cells, batch=4, on_prompts=done.append).values()
    assert sizes == [4, 4]
    assert done == [4, 1]
    assert result.values.tolist() == [0, 1, 2, 3, 4]
    assert result.exact.tolist() == [False, False, False, True, True]
    with pytest.raises(DataError, match="batch"):
        evaluate(engine, cells, batch=0)
    with pytest.raises(DataError, match="prompts of needle"):
        evaluate(engine, {Cell("needle", 8): []})


def test_a_loss_that_is_no_number_is_not_judged():
    def engine(prompts):
        loss = torch.tensor([prompt.target[0] for prompt in prompts]).double()
        loss[loss == 3] = float("nan")
        return Scores(loss, loss > 2, torch.ones(len(prompts), 4, dtype=torch.bool))

    cells = {Cell("code", 8): [Prompt((1,), (n,)) for n in range(5)]}
    with pytest.raises(FluxError, match=r"prompts \[3\] of code at 8: expected a number, got nan"):
        evaluate(engine, cells, batch=2)
