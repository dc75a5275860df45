"""The whole page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fluxcompile.explaining.prompt import PromptReport
from fluxcompile.html_page.bars import bars
from fluxcompile.html_page.heat_map import heat_map
from fluxcompile.html_page.layers import LayerOnPage, layers_of
from fluxcompile.html_page.markup import Markup, element, join
from fluxcompile.html_page.style import CSS, POLICY, SCRIPT
from fluxcompile.html_page.table import layer_table
from fluxcompile.html_page.units import bytes_in_words, seconds_in_words


def render(report: PromptReport) -> str:
    """An HTML document that makes no request. All texts in it are escaped."""
    layers = layers_of(report)
    title = f"fluxcompile: {len(layers)} attention layers"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", CSS),
    )
    body = element(
        "body",
        element("h1", title),
        _facts(report.facts),
        element("section", heat_map(layers, report.routes)),
        element("section", _times(report, layers)),
        element("section", _memory(report, layers)),
        element("section", element("h2", "Layers"), layer_table(layers)),
        element("script", SCRIPT),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _facts(facts: Mapping[str, str]) -> Markup:
    pairs = (join(element("dt", name), element("dd", value)) for name, value in facts.items())
    return element("dl", *pairs)


def _times(report: PromptReport, layers: Sequence[LayerOnPage]) -> Markup:
    title = element("h2", "Attention time a layer")
    if report.times is None:
        return join(title, element("p", "Not measured."))
    missing = sum(layer.routed is None or layer.full is None for layer in layers)
    note = f" {missing} layers have no operator of their own to time." if missing else ""
    total = sum(layer.routed or 0.0 for layer in layers)
    full = sum(layer.full or 0.0 for layer in layers)
    sums = f" All layers: {seconds_in_words(total)}, pinned to full {seconds_in_words(full)}."
    return join(
        title,
        element("p", report.times.how + sums + note),
        _legend("on the routes taken, some row sparse", "pinned to full"),
        bars(layers, lambda x: x.routed, lambda x: x.full, seconds_in_words, "attention time"),
    )


def _memory(report: PromptReport, layers: Sequence[LayerOnPage]) -> Markup:
    title = element("h2", "KV memory a layer")
    if report.memory is None:
        return join(title, element("p", "Not known: no FluxCache served this call."))
    what = (
        "Bytes that a FluxCache holds once the prompt has run, counted in the memory behind its "
        f"tensors, and what it would hold had it kept every token. All layers: {report.memory}."
    )
    return join(
        title,
        element("p", what),
        _legend("kept, some row sparse", "had every token been kept"),
        bars(layers, lambda x: x.kept, lambda x: x.untrimmed, bytes_in_words, "KV memory"),
    )


def _legend(sparse: str, pale: str) -> Markup:
    full = sparse.replace("some row sparse", "every row full")
    return element(
        "div",
        element("span", element("i", class_="full"), full),
        element("span", element("i", class_="sparse"), sparse),
        element("span", element("i", class_="pale"), pale),
        class_="legend",
    )
