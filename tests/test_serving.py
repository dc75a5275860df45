"""How models are served: generate's own compilation, wrappers, continuous batching."""

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

import fluxcompile
from fluxcompile import FluxWarning, RewriteError
from tests.test_owner import alone, flux_warnings, llama, logits, router_for


@pytest.fixture
def ids():
    return torch.randint(1, 61, (1, 40))


def other_backend(gm, example_inputs):
    raise AssertionError("generate compiled the model by itself")


def auto_compile(fullgraph: bool = False) -> CompileConfig:
    """What ``generate`` does on a GPU when it is given a static cache, here on a CPU."""
    config = CompileConfig(backend=other_backend, mode=None, fullgraph=fullgraph)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_generate_runs_our_code_where_it_would_compile_by_itself(ids, regional):
    model = llama("SFS")
    expected = alone(model, "SFS", ids, static=True)
    fluxcompile.compile(model, regional=regional, lowering="eager", strict=True)
    got = logits(model, ids, static=True, disable_compile=False, compile_config=auto_compile())
    torch.testing.assert_close(got, expected)
    assert str(fluxcompile.routes(model)).startswith("row 0: SFS")


def test_routes_of_a_wrapper_say_what_to_call_instead(ids):
    wrapper = torch.compile(llama("SF"), backend="flux", options={"lowering": "eager"})
    logits(wrapper, ids)
    with pytest.warns(FluxWarning, match=r"with fluxcompile\.compile\(model\)"):
        assert fluxcompile.routes(wrapper) is None
    with torch.no_grad():
        wrapper(ids)
    assert not flux_warnings(lambda: fluxcompile.routes(wrapper))


def continuous(model, prompts) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=-1)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)  # not all of the memory
    results = model.generate_batch(
        inputs=prompts,
        generation_config=config,
        continuous_batching_config=small,
        progress_bar=False,
    )
    assert not any(result.error for result in results.values()), results
    return [list(result.generated_tokens) for result in results.values()]


@pytest.mark.parametrize(
    "regional",
    [
        pytest.param(False, id="whole"),
        pytest.param(True, id="regional", marks=pytest.mark.slow),
    ],
)
def test_continuous_batching_runs_uncompiled_and_says_why(regional, lowered):
    model = llama(None, bos_token_id=None, eos_token_id=None)
    if not hasattr(model, "generate_batch"):
        pytest.skip("this transformers has no continuous batching")
    prompts = [torch.randint(1, 61, (n,)).tolist() for n in (20, 33)]
    expected = continuous(model, prompts)
    fluxcompile.compile(model, router_for(model, "SS"), regional=regional, lowering="eager")
    messages = flux_warnings(lambda: prompts.append(continuous(model, prompts)))
    assert set(messages) == {m for m in messages if "routed one by one: they run uncompiled" in m}
    assert messages
    assert prompts.pop() == expected
    assert fluxcompile.routes(model) is None
    assert not lowered


def test_packed_rows_are_refused_where_they_may_not_run_unrouted(ids):
    starts = torch.tensor([0, 20, 40], dtype=torch.int32)
    for options in ({"strict": True}, {"mode": "train"}):
        model = fluxcompile.compile(llama("SS"), lowering="eager", **options)
        with pytest.raises(RewriteError, match="packed into one row"):
            model(ids, cu_seq_lens_q=starts, cu_seq_lens_k=starts, use_cache=False)
