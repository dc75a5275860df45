"""What a compiled model did with one prompt: layers, routes, time and memory."""

from fluxcompile.explaining.layer_times import LayerTimes
from fluxcompile.explaining.prompt import PromptReport, explain_prompt

__all__ = ["LayerTimes", "PromptReport", "explain_prompt"]
