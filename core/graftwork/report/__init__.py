"""The report of a run or of a comparison: `report.json` for machines, `report.md` for issues, `report.html` for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graftwork.evaluate.comparison import Comparison
from graftwork.report.content import ReportContent as ReportContent


def write_report(folder: Path, content: ReportContent) -> None:
    """Write `report.json`, `report.md` and `report.html` into `folder`; the page needs no other file and no network."""
    from graftwork.report.markdown import render_markdown
    from graftwork.report.page import render_page

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(content), encoding="utf-8")
    (folder / "report.html").write_text(render_page(content), encoding="utf-8")


def render_fragment(**parts: Any) -> str:
    """Some parts of a `ReportContent` as HTML for a notebook, whose own style stays as it is."""
    from graftwork.report.page import render_sections

    return render_sections(ReportContent(title="", **parts))


def render_comparison(comparison: Comparison) -> str:
    """A comparison as Markdown, which a terminal shows as well."""
    from graftwork.report.markdown import comparison_blocks

    return "\n\n".join(filter(None, comparison_blocks(comparison)))
