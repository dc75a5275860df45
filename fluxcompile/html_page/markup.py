"""Elements of HTML and SVG, whose text is always escaped."""

from __future__ import annotations

from html import escape

#: elements that have no content
_VOID = frozenset({"meta", "rect", "line", "path"})


class Markup(str):
    """Text that is markup already. Only :func:`element` and this package's constants make it."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """``<tag attribute="...">children</tag>``.

    Children that are not :class:`Markup` are escaped, and so is every attribute. In names of
    attributes ``_`` stands for ``-``; one at the end is dropped (``class_``). None is left out.
    """
    parts = [
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value), quote=True)}"'
        for name, value in attributes.items()
        if value is not None
    ]
    opening = f"<{tag}{''.join(parts)}"
    if tag in _VOID:
        return Markup(f"{opening}/>")
    return Markup(f"{opening}>{join(*children)}</{tag}>")


def join(*children: object) -> Markup:
    """Children one after the other, escaped unless they are markup."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(str(child), quote=True)
            for child in children
        )
    )
