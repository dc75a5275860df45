"""A :class:`fluxcompile.explaining.PromptReport` as one HTML page that needs nothing else."""

from fluxcompile.html_page.page import render

__all__ = ["render"]
