"""HTML and SVG that cannot be broken by what is put into it: everything that is not `Markup` is escaped."""

from __future__ import annotations

from html import escape

VOID = frozenset({"img", "meta"})


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """An element. A trailing `_` of an attribute is dropped and others become `-`; None leaves an attribute out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Several pieces of HTML or text, one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))
