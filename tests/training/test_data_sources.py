"""The text that is always there, and its two splits."""

import pytest

from fluxcompile.training.data.sources import KINDS, SPLITS, sources, split_of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_there_is_enough_text(kind, split):
    found = sources(kind, split)
    assert sum(len(source.text) for source in found) > 250_000
    assert len(found) > 15
    assert [source.name for source in found] == sorted({source.name for source in found})


def test_a_module_and_its_docstrings_are_in_the_same_split():
    for split in SPLITS:
        names = {source.name for kind in KINDS for source in sources(kind, split)}
        assert {split_of(name) for name in names} == {split}


def test_splits_are_the_same_everywhere():
    named = {name: split_of(name) for name in ("argparse", "ast", "topic specialnames", "typing")}
    assert named == {
        "argparse": "train",
        "ast": "train",
        "topic specialnames": "heldout",
        "typing": "heldout",
    }


def paragraphs(kind: str, split: str, least: int) -> set[str]:
    texts = (" ".join(p.split()) for s in sources(kind, split) for p in s.text.split("\n\n"))
    return {text for text in texts if len(text) >= least}


def test_no_paragraph_of_prose_is_in_both_splits():
    assert not paragraphs("prose", "train", 80) & paragraphs("prose", "heldout", 80)


def test_hardly_any_code_is_in_both_splits():
    shared = paragraphs("code", "train", 200) & paragraphs("code", "heldout", 200)
    assert sum(map(len, shared)) < 0.01 * sum(map(len, paragraphs("code", "heldout", 0)))
