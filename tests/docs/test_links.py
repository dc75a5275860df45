"""Links between the pages lead somewhere."""

import re

import pytest

from tests.docs.blocks import FOLDER

PAGES = sorted(FOLDER.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in headings]
            assert anchor in anchors, target


def test_there_are_pages():
    names = {page.name for page in PAGES}
    assert names >= {
        *(
            "architecture.md",
            "models.md",
            "options.md",
            "sparse-modes.md",
            "troubleshooting.md",
            "tutorial.md",
        ),
    }
