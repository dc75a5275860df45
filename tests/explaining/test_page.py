"""The page says what the report says, asks for nothing, and runs no text as code."""

import re
from dataclasses import replace

import pytest

from fluxcompile.explaining import LayerTimes
from fluxcompile.html_page.layers import layers_of
from fluxcompile.html_page.markup import Markup, element, join
from fluxcompile.html_page.style import POLICY
from fluxcompile.html_page.units import bytes_in_words, seconds_in_words
from fluxcompile.passes.site import SkipReason
from fluxcompile.report import FluxReport, GraphReport
from fluxcompile.route_record import Routes
from tests.explaining import cases
from tests.explaining.reading import read

EVIL = """<img src=x onerror="alert(1)">'&</script><script>alert(2)</script>"""


@pytest.fixture
def report():
    return cases.by_hand()


@pytest.fixture
def page(report):
    return read(report.html())


@pytest.fixture
def evil(report):
    """Every text that comes from elsewhere is an attack."""
    (graph,) = report.layers.graphs
    rows = tuple(
        replace(row, path=f"{i}{EVIL}", mask=EVIL, cache=EVIL, became=EVIL, detail=EVIL,
                reason=SkipReason.DROPOUT, query_shape=(EVIL,))
        for i, row in enumerate(graph.rows)
    )  # fmt: skip
    names = tuple(row.path for row in rows)
    return replace(
        report,
        layers=FluxReport((GraphReport(rows, 0.0),)),
        routes=Routes(report.routes.fa, names),
        times=LayerTimes(dict.fromkeys(names, 1.0), dict.fromkeys(names, 2.0), EVIL),
        facts={EVIL: EVIL},
    ).html()


class TestContent:
    def test_facts(self, page):
        terms = [x.text for x in page.one("dl").all("dt")]
        assert dict(zip(terms, [x.text for x in page.all("dd")], strict=True)) == {
            "model": "tiny", "run": "a test",
        }  # fmt: skip

    def test_every_layer_has_its_line(self, page, report):
        lines = page.one("table", id="layers").one("tbody").all("tr")
        assert len(lines) == cases.LAYERS
        for index, (line, row) in enumerate(zip(lines, report.layers.rows, strict=True)):
            cells = [cell.text for cell in line.all("td")]
            assert cells[:2] == [str(index), row.path]
            assert cells[2] == " ".join(map(str, row.query_shape))
            assert cells[4:8] == [row.mask, row.cache, row.became, ""]
            assert cells[8] == "".join("FS"[not full] for full in report.routes.fa[:, index])
            assert cells[9] == seconds_in_words(report.times.routed[row.path])
            assert cells[10] == seconds_in_words(report.times.full[row.path])
            assert cells[11] == bytes_in_words(report.memory.layers[index])
            assert cells[12] == bytes_in_words(report.memory.untrimmed[index])

    def test_the_heat_map_is_the_routes(self, page, report):
        cells = page.one("svg", id="heat-map").all("g", class_="cell")
        assert len(cells) == cases.LAYERS * cases.ROWS
        for cell in cells:
            layer = report.routes.layer_names.index(cell.attributes["data-path"])
            full = bool(report.routes.fa[int(cell.attributes["data-row"]), layer])
            kind = "full" if full else "sparse"
            assert cell.attributes["data-route"] == kind
            assert cell.one("rect").attributes["class"] == kind
            assert cell.one("title").text.endswith(f"{kind} attention")
        places = {tuple(c.one("rect").attributes[k] for k in "xy") for c in cells}
        assert len(places) == len(cells)

    def test_omega_of_every_prompt_and_of_all(self, page):
        texts = [x.text for x in page.one("svg", id="heat-map").all("text")]
        assert [text for text in texts if text.startswith("Ω")] == ["Ω 0.50", "Ω 1.00", "Ω 0.00"]
        assert "sparse layers: 0.50" in page.text

    def test_times(self, page, report):
        bars = page.one("svg", id="attention-time").all("g", class_="bar")
        assert {
            bar.attributes["data-path"]: float(bar.attributes["data-taken"]) for bar in bars
        } == report.times.routed
        assert report.times.how in page.text
        assert "All layers: 5.8 ms, pinned to full 11 ms." in page.text

    def test_memory(self, page, report):
        bars = page.one("svg", id="KV-memory").all("g", class_="bar")
        kept, untrimmed = (
            tuple(int(bar.attributes[f"data-{name}"]) for bar in bars) for name in ("taken", "full")
        )
        assert (kept, untrimmed) == (report.memory.layers, report.memory.untrimmed)
        assert str(report.memory) in page.text

    def test_bars_are_in_proportion(self, page, report):
        for bar in page.one("svg", id="KV-memory").all("g", class_="bar"):
            full, kept = (float(x.attributes["height"]) for x in bar.all("rect"))
            share = float(bar.attributes["data-taken"]) / float(bar.attributes["data-full"])
            assert kept / full == pytest.approx(share, abs=0.01)


class TestWhatIsMissing:
    def test_no_routes(self, report):
        page = read(replace(report, routes=None).html())
        assert "Nobody routed this prompt" in page.text
        assert page.all("svg", id="heat-map") == []

    def test_no_times_and_no_memory(self, report):
        page = read(replace(report, times=None, memory=None).html())
        assert "Not measured." in page.text
        assert "no FluxCache served this call" in page.text
        cells = page.one("tbody").all("tr")[0].all("td")
        assert [cell.text for cell in cells[9:]] == ["—"] * 4

    def test_a_layer_without_a_time(self, report):
        times = LayerTimes({}, {}, "nohow")
        page = read(replace(report, times=times).html())
        assert f"{cases.LAYERS} layers have no operator of their own" in page.text

    def test_a_layer_that_was_not_routed(self, report):
        fewer = Routes(report.routes.fa[:, 1:], report.routes.layer_names[1:])
        page = read(replace(report, routes=fewer).html())
        routes = [
            cell.attributes["data-route"]
            for cell in page.all("g", class_="cell", data_path=report.layers.rows[0].path)
        ]
        assert routes == ["none"] * cases.ROWS

    @pytest.mark.parametrize(
        ("paths", "cache", "kept"),
        [
            (("a.2.x", "a.0.x", "a.3.x", "a.1.x"), "dynamic", (5000, 3000, 6000, 4000)),
            (("first", "second", "third", "last"), "dynamic", (3000, 4000, 5000, 6000)),
            (("a.0.x", "a.9.x", "a.1.x"), "dynamic", (3000, None, 4000)),
            (("a.0.x", "a.1.x", "a.2.x", "a.3.x"), "none", (None,) * 4),
        ],
        ids=["out of order", "without numbers", "beyond the cache", "no cache"],
    )
    def test_whose_memory_is_whose(self, report, paths, cache, kept):
        (graph,) = report.layers.graphs
        rows = tuple(replace(graph.rows[0], path=path, cache=cache) for path in paths)
        changed = replace(report, layers=FluxReport((GraphReport(rows, 0.0),)))
        assert tuple(layer.kept for layer in layers_of(changed)) == kept

    def test_no_layers(self, report):
        page = read(replace(report, layers=FluxReport(()), routes=None, times=None).html())
        assert "0 attention layers" in page.text

    def test_reasons(self, report):
        (graph,) = report.layers.graphs
        for reason in SkipReason:
            row = replace(graph.rows[0], reason=reason, detail="what was seen")
            page = read(replace(report, layers=FluxReport((GraphReport((row,), 0.0),))).html())
            assert f"{reason.value}: what was seen" in page.one("tbody").text


class TestSafety:
    def test_texts_are_escaped(self, evil):
        page = read(evil)
        assert page.all("img") == []
        assert len(page.all("script")) == 1
        assert page.one("dl").one("dt").text == EVIL
        lines = page.one("tbody").all("tr")
        assert [line.all("td")[1].text for line in lines] == [f"{i}{EVIL}" for i in range(4)]
        paths = {cell.attributes["data-path"] for cell in page.all("g", class_="cell")}
        assert paths == {f"{i}{EVIL}" for i in range(4)}
        assert not [
            name for e in page.walk() for name in e.attributes if name.lower().startswith("on")
        ]

    @pytest.mark.parametrize("attack", [False, True])
    def test_nothing_is_fetched(self, report, evil, attack):
        text = evil if attack else report.html()
        page = read(text)
        asking = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
        assert not [e.tag for e in page.walk() if asking & set(e.attributes)]
        assert not page.all("link")
        assert not page.all("iframe")
        inside = page.one("style").text + page.one("script").text
        for word in ("http", "url(", "@import", "fetch", "XMLHttp", "import(", "WebSocket"):
            assert word not in inside
        if not attack:
            assert not re.findall(r"https?:|//\w", text)

    def test_the_browser_is_told_to_fetch_nothing(self, page):
        (policy,) = page.all("meta", http_equiv="Content-Security-Policy")
        assert policy.attributes["content"] == POLICY
        assert POLICY.startswith("default-src 'none'")


class TestMarkup:
    def test_elements(self):
        made = element("td", "a<b", element("i", 3), class_="x", data_layer='"', title=None)
        assert made == '<td class="x" data-layer="&quot;">a&lt;b<i>3</i></td>'
        assert isinstance(made, Markup)
        assert element("rect", x=1) == '<rect x="1"/>'
        assert join("&", Markup("&")) == "&amp;&"

    @pytest.mark.parametrize(
        ("seconds", "words"),
        [(None, "—"), (2.5e-6, "2.5 µs"), (0.01234, "12.3 ms"), (1.5, "1.5 s")],
    )
    def test_seconds(self, seconds, words):
        assert seconds_in_words(seconds) == words

    @pytest.mark.parametrize(
        ("count", "words"),
        [(None, "—"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3 GiB")],
    )
    def test_bytes(self, count, words):
        assert bytes_in_words(count) == words
