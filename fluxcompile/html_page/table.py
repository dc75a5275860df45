"""The layer table: what each attention became and why, with its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from fluxcompile.html_page.layers import LayerOnPage
from fluxcompile.html_page.markup import Markup, element
from fluxcompile.html_page.units import bytes_in_words, seconds_in_words

HEADINGS = (
    *("#", "layer", "query", "key", "mask", "cache", "became", "why", "routes"),
    *("time", "time, full", "KV", "KV, all kept"),
)
NUMBERS = HEADINGS[-4:]


def layer_table(layers: Sequence[LayerOnPage]) -> Markup:
    heading = element("tr", *(element("th", text) for text in HEADINGS))
    lines = [_line(layer) for layer in layers]
    return element("table", element("thead", heading), element("tbody", *lines), id="layers")


def _line(layer: LayerOnPage) -> Markup:
    row = layer.row
    letters = "" if layer.routes is None else "".join("F" if full else "S" for full in layer.routes)
    shapes = (" ".join(map(str, shape)) for shape in (row.query_shape, row.key_shape))
    texts = (layer.index, row.path, *shapes, row.mask, row.cache, row.became, row.why, letters)
    amounts = (
        *(seconds_in_words(x) for x in (layer.routed, layer.full)),
        *(bytes_in_words(x) for x in (layer.kept, layer.untrimmed)),
    )
    return element(
        "tr",
        *(element("td", text) for text in texts),
        *(element("td", text, class_="number") for text in amounts),
        data_layer=layer.index,
    )
