"""What pages are made of: the page itself, sections, tables, and images that are part of it."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.contracts.records import Image
from graftwork.data import load_image
from graftwork.errors import DataError
from graftwork.report.markup import Markup, tag
from graftwork.report.wording import grid

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

IMAGE_SIDE = 240


def page(title: str, sections: Iterable[Markup]) -> str:
    """A whole page that needs no other file."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(_style())),
    )
    body = tag("body", tag("main", *sections))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def fragment(sections: Iterable[Markup]) -> Markup:
    """Sections alone, with a style that holds for nothing else on the page."""
    nested = _style().replace(":root {", "& {").replace("body {", "& {").replace("margin: 0; background", "background")
    return tag("div", tag("style", Markup(f".graftwork {{{nested}}}")), *sections, class_="graftwork")


def _style() -> str:
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def section(title: str, *children: Markup) -> Markup:
    """A section with its heading."""
    return tag("section", tag("h2", title), *children)


def embed(image: Image) -> Markup:
    """An image as part of the page, scaled down; a sentence where it cannot be read any more."""
    try:
        decoded = load_image(image)
    except DataError as error:
        return tag("p", error.sentence, class_="small")
    decoded.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    kind, data = min((_encode(decoded, kind) for kind in ("png", "jpeg")), key=lambda encoded: len(encoded[1]))
    source = f"data:image/{kind};base64,{b64encode(data).decode()}"
    return tag("img", src=source, alt="The image that the question is about", loading="lazy")


def _encode(image: PILImage, kind: str) -> tuple[str, bytes]:
    buffer = BytesIO()
    image.save(buffer, kind, quality=85)
    return kind, buffer.getvalue()


def facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Names with a value each."""
    rows = (tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in pairs)
    return tag("div", tag("table", tag("tbody", *rows), class_="facts"), class_="wide")


def rows(content: Sequence[Mapping[str, Any]]) -> Markup:
    """A table of plain data; the first row says which columns there are."""
    return table(*grid(content))


def table(headers: Sequence[str], lines: Iterable[Sequence[str]], marked: Sequence[str] = ()) -> Markup:
    """A table that scrolls on narrow screens; rows whose name is `marked` get an asterisk."""
    head = tag("tr", *(tag("th", header, scope="col") for header in headers))
    body = (
        tag(
            "tr",
            tag("th", name, " *" if name in marked else "", scope="row"),
            *(tag("td", cell, class_="number" if cell[:1] in "+-–0123456789<" else None) for cell in cells),
        )
        for name, *cells in lines
    )
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide", tabindex="0")
