"""What routes cost in quality: held-out prompts through the compiled model, with hard routes."""

from fluxcompile.evaluation.as_user import AsUser
from fluxcompile.evaluation.evaluate import CellResult, Results, evaluate
from fluxcompile.evaluation.one_graph import OneGraph
from fluxcompile.evaluation.prompts import Cell, Prompt, builtin_prompts

__all__ = [
    "AsUser",
    "Cell",
    "CellResult",
    "OneGraph",
    "Prompt",
    "Results",
    "builtin_prompts",
    "evaluate",
]
