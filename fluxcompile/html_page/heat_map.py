"""Routes as a heat map: a column a layer, a row a prompt, and the Ω of each."""

from __future__ import annotations

from collections.abc import Sequence

from fluxcompile.html_page.axis import LEFT, STEP, numbers, width
from fluxcompile.html_page.layers import LayerOnPage
from fluxcompile.html_page.markup import Markup, element, join
from fluxcompile.route_record import Routes

HEIGHT = 22
RIGHT = 90  # room for Ω


def heat_map(layers: Sequence[LayerOnPage], routes: Routes | None) -> Markup:
    """The section."""
    title = element("h2", "Routes")
    if routes is None:
        return join(
            title, element("p", "Nobody routed this prompt: every layer ran full attention.")
        )
    batch = len(routes.fa)
    what = f"A column a layer, a row a prompt. Ω is the share of sparse layers: {routes.omega:.2f}."
    legend = element(
        "div",
        element("span", element("i", class_="full"), "full attention"),
        element("span", element("i", class_="sparse"), "sparse attention"),
        element("span", element("i", class_="pale"), "not routed: full attention"),
        class_="legend",
    )
    omegas = routes.omega_per_row.tolist()
    cells = [
        _cell(layer, row, LEFT + layer.index * STEP, row * HEIGHT)
        for row in range(batch)
        for layer in layers
    ]
    ends = [
        join(
            element("text", f"prompt {row}", x=0, y=row * HEIGHT + 15),
            element(
                "text", f"Ω {omegas[row]:.2f}", x=width(layers) + 8, y=row * HEIGHT + 15,
                data_omega=f"{omegas[row]:.4f}",
            ),
        )
        for row in range(batch)
    ]  # fmt: skip
    picture = element(
        "svg",
        *cells,
        *ends,
        numbers(layers, batch * HEIGHT + 14),
        width=width(layers) + RIGHT,
        height=batch * HEIGHT + 20,
        role="img",
        aria_label="routes of every layer and prompt",
        id="heat-map",
    )
    return join(title, element("p", what), legend, picture)


def _cell(layer: LayerOnPage, row: int, x: int, y: int) -> Markup:
    if layer.routes is None:
        route = "none"
    else:
        route = "full" if layer.routes[row] else "sparse"
    words = {"none": "not routed", "full": "full attention", "sparse": "sparse attention"}[route]
    return element(
        "g",
        element("title", f"{layer.row.path}, prompt {row}: {words}"),
        element(
            "rect", x=x, y=y, width=STEP - 2, height=HEIGHT - 2, rx=3,
            class_="pale" if route == "none" else route, data_layer=layer.index,
        ),
        class_="cell", data_path=layer.row.path, data_row=row, data_route=route,
    )  # fmt: skip
