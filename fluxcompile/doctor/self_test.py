"""One layer, compiled: full attention equals eager, sparse attention equals its definition."""

from __future__ import annotations

import time
import warnings

import torch
from torch import nn

from fluxcompile.doctor.finding import Finding, fail, ok

SINK, LOCAL, TOKENS, VOCABULARY = 16, 40, 200, 97
#: how much more than the same precision's own rounding a right result may be off by
SLACK = 4.0
#: absolute, in logits of a size of about 1: what sums in another order amount to in float32
ROUNDING = 1e-4


def self_test(routes: str, lowering: str) -> Finding:
    """Compile a one-layer model with ``routes`` pinned and compare.

    On the GPU if there is one, in bfloat16 and through the Triton kernels; on the CPU in float32.

    Args:
        routes: ``"full"`` or ``"sparse"``.
        lowering: as the backend's option.
    """
    name = f"self-test, {routes}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    try:
        error, allowed = largest_error(routes, lowering, device)
    except Exception as problem:  # whatever it is, it is what this test is for
        text = " ".join(str(problem).split())[:300]
        return fail(
            name,
            f"{type(problem).__name__}: {text}",
            "see the lines above first; if they are well, try --lowering eager and report both",
        )
    against = "eager" if routes == "full" else "the definition"
    where = f"{device}, {lowering}, {time.perf_counter() - started:.1f} s"
    if not error <= allowed:  # NaN is not
        return fail(
            name,
            f"differs from {against} by {error:.2g}, expected at most {allowed:.2g} ({where})",
            "the answers of this installation are wrong: report versions and GPU, use routes='full'"
            if routes == "sparse"
            else "the answers of this installation are wrong: report versions and GPU",
        )
    return ok(name, f"equals {against} within {error:.2g} ({where})")


@torch.no_grad()
def largest_error(routes: str, lowering: str, device: str) -> tuple[float, float]:
    """Of the compiled model's logits against the definition in float32, and what is allowed."""
    model, ids = one_layer(device), prompt(device)
    mask = None if routes == "full" else sparse_mask(device)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    allowed = ROUNDING
    if device == "cuda":
        model = model.to(torch.bfloat16)
        rounded = model(ids, attention_mask=mask, use_cache=False).logits
        allowed += SLACK * float((rounded.float() - expected).abs().max())
    got = compiled_logits(model, ids, routes, lowering)
    return float((got.float() - expected).abs().max()), allowed


def one_layer(device: str) -> nn.Module:
    """A Llama of one layer whose attention says something, the same every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        initializer_range=0.1,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return model.eval().requires_grad_(False).to(device)


def prompt(device: str) -> torch.Tensor:
    """Token ids ``[1, TOKENS]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (1, TOKENS), generator=generator).to(device)


def sparse_mask(device: str) -> torch.Tensor:
    """Sink and local window as a bool mask ``[1, 1, TOKENS, TOKENS]``, from the definition."""
    from fluxcompile.kernels.reference import visible_keys

    valid = torch.ones(1, TOKENS, dtype=torch.bool, device=device)
    position = torch.arange(TOKENS, device=device)
    return visible_keys(valid, position, sink=SINK, local=LOCAL).view(1, 1, TOKENS, TOKENS)


def compiled_logits(
    model: nn.Module, ids: torch.Tensor, routes: str, lowering: str
) -> torch.Tensor:
    """What the model gives once compiled, every layer on ``routes``."""
    import fluxcompile

    config = fluxcompile.FluxConfig(sink=SINK, local=LOCAL)
    options = {"routes": routes, "config": config, "lowering": lowering, "strict": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Inductor, about itself
        compiled = torch.compile(model, backend="flux", options=options)
        return compiled(ids, use_cache=False).logits
