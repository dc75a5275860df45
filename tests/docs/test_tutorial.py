"""docs/tutorial.md, run from top to bottom: every snippet, and every command."""

import shlex

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fluxcompile import FluxRouter
from fluxcompile.cli import app
from tests.docs.blocks import blocks_of, run_python
from tests.explaining.reading import read

PAGE = "tutorial.md"


def commands(text: str) -> list[list[str]]:
    """Lines that begin with ``$``, with the indented ones that follow."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append(line[2:])
        else:
            assert line.startswith("    "), f"expected a command or its continuation, got {line!r}"
            found[-1] += line
    return [shlex.split(command) for command in found]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The page, done: what its snippets define, the commands run, and what these printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    namespace: dict = {"__name__": "tutorial"}
    outputs: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        for block in blocks_of(PAGE):
            if block.language == "python":
                run_python(PAGE, [block], namespace)
                continue
            assert block.language == "console", f"{PAGE}:{block.line}: {block.language} is not run"
            for program, *arguments in commands(block.text):
                assert program == "fluxcompile"
                result = CliRunner().invoke(app, arguments)  # in this process: torch is loaded
                assert result.exit_code == 0, f"{PAGE}:{block.line}: {result.output}"
                outputs[arguments[0]] = result.output
    yield folder, namespace, outputs
    namespace["server"].server_close()


def test_every_step_ran(done):
    folder, _, outputs = done
    assert list(outputs) == ["doctor", "train", "explain"]
    assert "self-test, sparse" in outputs["doctor"]
    router = FluxRouter.from_pretrained(folder / "my-router")
    assert (router.config.sink, router.config.local) == (4, 16)
    assert "| qa | 0.45 |" in (folder / "my-router" / "README.md").read_text()


def test_the_page_of_the_two_prompts(done):
    folder, _, outputs = done
    assert "2 attention layers" in outputs["explain"]
    page = read((folder / "page.html").read_text())
    assert len(page.all("g", class_="cell")) == 2 * 2
    assert "the router in my-router" in page.one("dl").text


def test_a_fixed_pattern_gives_memory_back(done):
    _, names, _ = done
    memory = names["cache"].memory()
    assert memory.trimmed == (1,)
    assert memory.share < 1


@torch.no_grad()
def test_the_server_answered_as_the_model_does(done):
    """The router is all but untrained, so its routes are full: what eager says is right."""
    folder, names, _ = done
    assert [set(one) for one in names["answers"]] == [{"text", "sparse"}] * 2
    assert [one["sparse"] for one in names["answers"]] == [0.0, 0.0]
    eager = AutoModelForCausalLM.from_pretrained(folder / "toy").eval()
    inputs = names["inputs"]
    ids = eager.generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = names["tokenizer"].batch_decode(
        ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
    )
    assert [one["text"] for one in names["answers"]] == expected
