"""The page in a real browser, headless: it draws, fits, marks layers, and fetches nothing."""

import json
import shutil
import subprocess

import pytest

from tests.explaining import cases
from tests.explaining.reading import read

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {BROWSERS} is installed")

#: what the test asks of the browser, written where --dump-dom shows it
ASK = """<script>
addEventListener("load", () => {
  const cell = document.querySelector('rect[data-layer="2"]');
  cell.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  const marked = [...document.querySelectorAll(".marked")];
  const boxes = [...document.querySelectorAll("section, svg, table")];
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = JSON.stringify({
    marked: marked.map(each => each.dataset.layer),
    tags: [...new Set(marked.map(each => each.tagName))].sort(),
    empty: boxes.filter(each => !each.getBoundingClientRect().height).length,
    boxes: boxes.length,
    wide: document.documentElement.scrollWidth - innerWidth,
    fetched: performance.getEntriesByType("resource").length,
    full: getComputedStyle(document.querySelector("rect.full")).fill,
  });
  document.body.append(answer);
});
</script></body>"""


def browse(*arguments: str) -> subprocess.CompletedProcess:
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars", "--enable-logging=stderr", "--window-size=1240,1100", *arguments,
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """What the browser made of the page, and what it said on its console."""
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(cases.by_hand().html().replace("</body>", ASK))
    done = browse("--dump-dom", file.as_uri())
    answer = json.loads(read_answer(done.stdout))
    return answer, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def read_answer(document: str) -> str:
    return read(document[document.index('<pre id="answer">') :].split("</pre>")[0] + "</pre>").text


def test_everything_is_drawn(opened):
    answer, console = opened
    assert answer["boxes"] == 4 + 3 + 1
    assert answer["empty"] == 0
    assert answer["wide"] <= 0
    assert answer["full"] == "rgb(51, 65, 85)"
    assert console == []


def test_nothing_is_fetched(opened):
    assert opened[0]["fetched"] == 0


def test_a_layer_is_marked_everywhere(opened):
    """In the heat map, in both pictures and in the table."""
    answer, _ = opened
    assert set(answer["marked"]) == {"2"}
    assert len(answer["marked"]) == cases.ROWS + 2 + 2 + 1
    assert answer["tags"] == ["TR", "rect"]


def test_it_is_painted(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(cases.by_hand().html())
    browse(f"--screenshot={picture}", page.as_uri())
    pixels = (pyplot.imread(picture)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    for colour in ((51, 65, 85), (16, 185, 129), (203, 213, 225)):  # full, sparse, the bars behind
        assert (pixels == colour).all(axis=1).sum() > 500
