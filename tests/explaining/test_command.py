"""``fluxcompile explain`` as a user runs it."""

import pytest
import torch
from typer.testing import CliRunner

from fluxcompile import FluxRouter, smollm2
from fluxcompile.cli import app
from fluxcompile.errors import OptionError
from fluxcompile.explaining import command
from fluxcompile.explaining.command import ExplainSettings
from tests.explaining.reading import read
from tests.router_models import random_router, tiny_llama
from tests.training.byte_tokenizer import ByteTokenizer

ROUTES = ("--routes", "1,0", "--sink", "3", "--local", "9")


def run(*arguments: object):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    return folder


def test_the_table_and_the_page(folder, tmp_path):
    page = tmp_path / "page.html"
    result = run(folder, *ROUTES, "--tokens", 90, "--html", page, "--repeats", 1)
    assert result.exit_code == 0, result.output
    assert "2 attention layers" in result.output
    assert "│ model.layers.1.self_attn │" in result.output, "folded"
    assert "row 0: FS  Ω=0.50" in result.output
    assert f"page: {page}" in result.output.replace("\n", "")
    document = read(page.read_text())
    facts = document.one("dl").text
    for part in ("LlamaForCausalLM", "90 tokens", "1,0; sparse is sink 3 + local 9", "fluxcompile"):
        assert part in facts
    routes = [c.attributes["data-route"] for c in document.all("g", class_="cell")]
    assert routes == ["full", "sparse"]
    assert len(document.one("svg", id="attention-time").all("g", class_="bar")) == 2
    assert len(document.one("svg", id="KV-memory").all("g", class_="bar")) == 2


def test_prompts_are_rows_and_a_router_decides(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=259)
    monkeypatch.setattr(command, "load_model", lambda *_: (model, ByteTokenizer()))
    random_router(head_dim=16).save_pretrained(tmp_path)
    report = command.run_explain(
        ExplainSettings("it", router=str(tmp_path), prompts=("short", "a longer prompt " * 5))
    )
    assert report.facts["prompts"] == "6 tokens, 81 tokens"
    assert report.routes.fa.shape == (2, 2)
    assert report.times is None, "only the page shows times"
    assert {row.became for row in report.layers.rows} == {"routed: full or streaming"}
    assert FluxRouter.from_pretrained(tmp_path).config.sink == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--routes", "1,2"), '--routes: expected "full"'),
        (("--routes", "full", "--router", "x"), "none beside --router"),
        (("--routes", "static"), "--routes static"),
        (("--router", "no/such/folder"), "no/such/folder"),
        (("--html", "no/such/folder/page.html"), "--html: expected a file in a folder there is"),
        (("--html", "."), "--html"),
        (("--prompt", "words"), "--prompt: expected a model with a tokenizer"),
        (("--routes", "1,0,1", "--tokens", "30"), "expected 2 entries"),
        (("--sink", "0"), "sink"),
        (("--device", "cuda"), "--device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_said(folder, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("has a GPU")
    result = run(folder, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_a_model_that_is_not_there(tmp_path):
    result = run(tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "nowhere" in result.output


class TestWhoRoutes:
    def test_smollm2_by_default(self, monkeypatch):
        monkeypatch.setattr(command, "packaged_routers", dict)
        options, router, words = command.routing(ExplainSettings())
        assert (options["routes"], router) == (smollm2.static_routes(), None)
        assert "sink 64 + local 512" in words
        options, _, words = command.routing(ExplainSettings(routes="static", local=99))
        assert options["config"].local == 99
        monkeypatch.setattr(command, "packaged_routers", lambda: {"smollm2-135m": "it"})
        assert command.routing(ExplainSettings())[:2] == ({}, "smollm2-135m")

    def test_nobody(self):
        assert command.routing(ExplainSettings("m"))[:2] == ({}, None)

    def test_words(self):
        options, _, words = command.routing(ExplainSettings("m", routes="sparse", sink=7))
        assert (options["routes"], options["config"].sink) == ("sparse", 7)
        assert words == "sparse; sparse is sink 7 + local 2048"


class TestPrompts:
    @pytest.fixture
    def model(self):
        return tiny_llama()

    def test_padding_is_on_the_left(self, model):
        settings = ExplainSettings("m", prompts=("ab", "abcd"))
        given = command.batch(model, ByteTokenizer(), settings)
        assert given["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]
        assert given["input_ids"][0, :2].tolist() == [0, 0]

    @pytest.mark.parametrize("tokenizer", [None, ByteTokenizer()], ids=["none", "bytes"])
    @pytest.mark.parametrize("tokens", [5, 30000])
    def test_built_in(self, model, tokenizer, tokens):
        given = command.batch(model, tokenizer, ExplainSettings("m", tokens=tokens))
        assert given["input_ids"].shape == (1, tokens)
        assert given["attention_mask"].all()

    def test_an_empty_prompt(self, model):
        class Plain(ByteTokenizer):
            def __call__(self, text):
                return super().__call__(text, add_special_tokens=False)

        with pytest.raises(OptionError, match="at least one token each"):
            command.batch(model, Plain(), ExplainSettings("m", prompts=("",)))
