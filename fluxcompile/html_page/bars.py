"""Two bars a layer: what was taken, in front of what full attention would have taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fluxcompile.html_page.axis import LEFT, STEP, numbers, width
from fluxcompile.html_page.layers import LayerOnPage
from fluxcompile.html_page.markup import Markup, element, join

HEIGHT = 120


def bars(
    layers: Sequence[LayerOnPage],
    taken: Callable[[LayerOnPage], float | None],
    full: Callable[[LayerOnPage], float | None],
    words: Callable[[float], str],
    name: str,
) -> Markup:
    """The picture.

    Args:
        taken, full: a layer's amounts; None where they are not known.
        words: an amount with its unit.
        name: of the picture, for those who cannot see it.
    """
    known = [x for layer in layers for x in (taken(layer), full(layer)) if x is not None]
    most = max(known, default=0) or 1
    drawn = [_bar(layer, taken(layer), full(layer), most, words) for layer in layers]
    axis = [
        element("line", x1=LEFT, x2=width(layers), y1=HEIGHT, y2=HEIGHT, class_="axis"),
        element("text", words(most), x=0, y=10),
        element("text", "0", x=0, y=HEIGHT),
    ]
    return element(
        "svg",
        *axis,
        *drawn,
        numbers(layers, HEIGHT + 14),
        width=width(layers) + 20,
        height=HEIGHT + 20,
        role="img",
        aria_label=name,
        id=name.replace(" ", "-"),
    )


def _bar(
    layer: LayerOnPage,
    taken: float | None,
    full: float | None,
    most: float,
    words: Callable[[float], str],
) -> Markup:
    if taken is None or full is None:
        return join()
    x = LEFT + layer.index * STEP
    sparse = layer.routes is not None and not all(layer.routes)
    return element(
        "g",
        element("title", f"{layer.row.path}: {words(taken)}, full {words(full)}"),
        _rect(x, 18, full / most, "pale", layer.index),
        _rect(x + 3, 12, taken / most, "sparse" if sparse else "full", layer.index),
        class_="bar", data_path=layer.row.path, data_taken=taken, data_full=full,
    )  # fmt: skip


def _rect(x: int, wide: int, share: float, kind: str, layer: int) -> Markup:
    tall = round(share * (HEIGHT - 14), 1)
    return element(
        "rect", x=x + 2, y=round(HEIGHT - tall, 1), width=wide, height=tall, class_=kind,
        data_layer=layer,
    )  # fmt: skip
