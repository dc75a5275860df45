"""The axis of layers that all pictures share, so that a layer stands below itself."""

from __future__ import annotations

from collections.abc import Sequence

from fluxcompile.html_page.layers import LayerOnPage
from fluxcompile.html_page.markup import Markup, element, join

LEFT, STEP = 72, 24  # pixels: room for labels, and a layer's width


def width(layers: Sequence[LayerOnPage]) -> int:
    return LEFT + STEP * len(layers)


def numbers(layers: Sequence[LayerOnPage], y: int) -> Markup:
    """The layers' numbers, at height ``y``."""
    return join(
        *(
            element(
                "text", layer.index, x=LEFT + layer.index * STEP + STEP // 2 - 1, y=y,
                text_anchor="middle",
            )
            for layer in layers
        )
    )  # fmt: skip
