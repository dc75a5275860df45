"""Compile with the backend, count and report its graphs, run and compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel

from fluxcompile.backend import compile_graph, flux
from fluxcompile.options import CompileOptions
from fluxcompile.report import GraphReport
from tests.parity.models import Prompt
from tests.parity.reference import RoutedDefinition, routed_logits

#: fp32 logits of these models are of order 10; eager attention itself is good to about 1e-6 of that
TOLERANCE = 5e-5
#: HF's rule for greedy tokens: another token only where the scores tie this closely
TIE = 1e-5


@dataclass
class Compiled:
    """A model compiled by the backend, with a report of each graph it compiled.

    ``backend="flux"`` itself, by its name, is what ``test_lowered.py`` compiles with.
    """

    model: PreTrainedModel
    reports: list[GraphReport] = field(default_factory=list)

    @property
    def graphs(self) -> int:
        return len(self.reports)

    @property
    def became(self) -> set[str]:
        return {row.became for report in self.reports for row in report.rows}

    @property
    def reasons(self) -> set:
        return {row.reason for report in self.reports for row in report.rows}


def compiled(
    model: PreTrainedModel, dynamic: bool | None = None, lowering: str = "eager", **options
) -> Compiled:
    """Compile ``model`` in place."""
    result = Compiled(model)
    options = {"lowering": lowering, **options}
    # Asking for a report turns warnings and strictness off, so it is asked for separately.
    reporting = CompileOptions.parse({**options, "lowering": "eager", "strict": False}, None)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        compiled_graph = flux(gm, example_inputs, options=options)
        compile_graph(gm, example_inputs, reporting, result.reports)
        return compiled_graph

    model.compile(backend=backend, dynamic=dynamic)
    return result


def eager(model: PreTrainedModel) -> None:
    """Undo ``compiled``."""
    model._compiled_call_impl = None


@dataclass(frozen=True)
class Generated:
    """New tokens ``[B, N]`` and the logits that chose them ``[B, N, V]``."""

    tokens: torch.Tensor
    logits: torch.Tensor


@torch.no_grad()
def generate(
    model: PreTrainedModel, prompt: Prompt, new: int, static: bool = False, **options
) -> Generated:
    """Greedy ``generate`` of exactly ``new`` tokens; ``options`` may allow HF's own compilation."""
    extra = {"cache_implementation": "static"} if static else {}
    out = model.generate(
        prompt.ids,
        attention_mask=prompt.mask,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **({"disable_compile": True} | extra | options),
    )
    tokens = out.sequences[:, prompt.ids.shape[1] :]
    assert tokens.shape[1] == new
    return Generated(tokens, torch.stack(out.logits, dim=1))


@torch.no_grad()
def forward(model: PreTrainedModel, prompt: Prompt, **inputs) -> torch.Tensor:
    return model(input_ids=prompt.ids, attention_mask=prompt.mask, **inputs).logits


def assert_logits(got: torch.Tensor, expected: torch.Tensor, valid: torch.Tensor) -> None:
    """Equal at valid positions, up to fp32 rounding."""
    keep = valid.bool()
    worst = (got - expected)[keep].abs().max().item()
    assert worst <= TOLERANCE, f"logits: expected a difference of {TOLERANCE} at most, got {worst}"


def assert_same_generation(got: Generated, expected: Generated) -> None:
    """Same tokens, or a tie at a row's first difference; same logits up to there."""
    for row in range(got.tokens.shape[0]):
        differs = (got.tokens[row] != expected.tokens[row]).nonzero().flatten()
        upto = int(differs[0]) if differs.numel() else got.tokens.shape[1] - 1
        if differs.numel():
            scores = expected.logits[row, upto]
            gap = (scores[got.tokens[row, upto]] - scores[expected.tokens[row, upto]]).abs().item()
            assert gap <= TIE, f"row {row}, token {upto}: expected the same token, scores {gap} off"
        steps = slice(0, upto + 1)
        worst = (got.logits[row, steps] - expected.logits[row, steps]).abs().max().item()
        assert worst <= TOLERANCE, f"row {row}: expected logits within {TOLERANCE}, got {worst}"


def assert_follows(
    model: PreTrainedModel, got: Generated, prompt: Prompt, definition: RoutedDefinition
) -> None:
    """Every token is what the reference chooses after the same tokens, with the same logits."""
    expected = reference_after(model, got, prompt, definition)
    worst = (got.logits - expected).abs().amax(dim=(0, 2))
    assert worst.max() <= TOLERANCE, f"expected logits within {TOLERANCE} at each step, got {worst}"
    best = expected.amax(-1)
    chosen = expected.gather(-1, got.tokens[..., None])[..., 0]
    assert (best - chosen).max() <= TIE


def reference_after(
    model: PreTrainedModel, got: Generated, prompt: Prompt, definition: RoutedDefinition
) -> torch.Tensor:
    """Reference logits ``[B, N, V]`` at the steps that chose ``got.tokens``, all in one forward."""
    ids, valid, positions = prompt.then(got.tokens[:, :-1])
    logits = routed_logits(
        model, definition, ids, attention_mask=valid, position_ids=positions, use_cache=False
    )
    return logits[:, prompt.ids.shape[1] - 1 :]


def definition_of(full: torch.Tensor, config, dense_from: int | None = None) -> RoutedDefinition:
    return RoutedDefinition(full, config.sink, config.local, dense_from)


def all_rows(batch: int, pattern: Sequence[int]) -> torch.Tensor:
    """bool ``[B, layers]``: the same pattern, 1 for full, in every row."""
    return torch.tensor([[bool(x) for x in pattern]] * batch)
