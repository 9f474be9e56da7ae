"""A report's page holds everything it shows, says what `report.json` says, and cannot be broken by an answer."""

from __future__ import annotations

import base64
import json
import math
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from tiny_vlm import Quiz, question

from graftwork.contracts import Choice, ModelSpec, Plan, Prediction, RunContext, Score, Verdict, WeightsRef
from graftwork.evaluate.comparison import Comparison, compare
from graftwork.evaluate.evaluation import Result
from graftwork.evaluate.scores import format_change, format_score
from graftwork.report import ReportContent, write_report
from graftwork.report.charts import POINTS, axis_ticks, running_mean, thin
from graftwork.report.markup import Markup, tag
from graftwork.report.page import FLIPS
from graftwork.report.wording import text

HOSTILE = "</q></script><script>alert('x')</script><img src=http://evil.example/x> | `\\"
VOID = {"img", "meta"}


class Page(HTMLParser):
    """What a page holds: its elements, whether they nest, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, {key: value or "" for key, value in attributes}))
        if name not in VOID:
            self.open.append(name)
        if name == "tr":
            self.rows.append([])
        elif name in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data

    def named(self, name: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.elements if found == name]


def comparison(folder: Path, *, gained: int = 20, lost: int = 3) -> Comparison:
    Image.new("RGB", (900, 700), (200, 30, 40)).save(folder / "large.png")
    ones = []
    for number in range(60):
        base, adapter = float(not 0 <= number < gained), float(not 30 <= number < 30 + lost)
        image = str(folder / ("gone.png" if number == 1 else "large.png")) if number != 2 else ""
        group = HOSTILE if number < 30 else "colour"
        record = question(f"q{number}", HOSTILE, image=image, group=group, reference="yes")
        said = {"base": HOSTILE, "adapter": f"answer {number}"}
        scores = {"base": Score(base, group), "adapter": Score(adapter, group)}
        ones.append(Prediction(record, said, scores, {"base": 1, "adapter": 1}, 0.1))
    provenance = {"checkpoint": "c0ffee" * 10, "base_eye": "ba5e" * 16, "tokens": {"base": 60, "adapter": 1060}}
    provenance |= {"seconds": 6.0, "answers": {"file": "answers.jsonl", "sha256": "f0" * 32}}
    return compare(Result(Quiz(), tuple(ones), (), provenance), ["colour"])


def choice(kind: str, name: str) -> Choice:
    weights = WeightsRef("zoo/tiny", "/models/tiny", sha256="ab" * 32)
    return Choice(kind, name, name, "acme", "1.2", {"rank": 8, "note": HOSTILE}, weights=weights)


def full_content(folder: Path) -> ReportContent:
    return ReportContent(
        title=f"A run {HOSTILE}",
        summary=HOSTILE,
        verdict=Verdict(False, (HOSTILE, "the loss ends at 7")),
        comparisons=[comparison(folder)],
        log=[{"step": s, "loss": math.nan if s == 5 else 3 / s, "skipped": True} for s in range(1, 40)],
        plan=Plan(ModelSpec(choice("model", "tiny"), {"eye": choice("vision_tower", "pin")}), RunContext(seed=23)),
        counts={"total": 2000, "trained": 60},
        roles=[{"role": "language", "trained": 60, "fresh": True}],
        kernels={"language": {"ran": {"plain": 40}, "fallbacks": [HOSTILE]}},
        data=[{"name": "quiz", "read": 1234, "kept": 1200}],
        verification={"distance": 0.25, "fresh_process": True, "sha256": "cd" * 32},
        provenance={"command": HOSTILE},
        notes=[HOSTILE],
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_report(tmp_path / "report", full_content(tmp_path))
    return tmp_path / "report"


def test_the_page_needs_nothing_from_outside_and_runs_nothing(folder: Path) -> None:
    page = Page(folder / "report.html")
    for name, attributes in page.elements:
        assert name not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for key, value in attributes.items():
            assert not key.startswith("on")
            assert key not in ("href", "srcset", "action", "data")
            assert key != "src" or value.startswith("data:image/")
    style = (folder / "report.html").read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_answers_are_shown_as_text(folder: Path) -> None:
    page = Page(folder / "report.html")
    assert HOSTILE in page.text
    assert page.named("script") == []
    assert not any("evil" in image["src"] for image in page.named("img"))
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert "<img" not in markdown


def test_tables_of_the_markdown_keep_their_columns(folder: Path) -> None:
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    width = None
    for line in lines:
        bars = line.replace("\\\\", "").replace("\\|", "").count("|") if line.startswith("|") else None
        assert bars is None or width is None or bars == width
        width = bars
    assert sum(line.startswith("| ---") for line in lines) >= 7


def test_images_are_embedded_scaled_down_and_limited(folder: Path) -> None:
    page = Page(folder / "report.html")
    images = page.named("img")
    assert len(page.named("article")) == FLIPS + 3
    assert len(images) == FLIPS + 3 - 2, "one image is gone, and one question has none"
    for image in images:
        assert image["alt"]
        with Image.open(BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as image:
            assert max(image.size) == 240
    assert "gone.png' does not exist" in " ".join(page.text)
    assert any("12 of 20 answers" in part for part in page.text)


def test_the_numbers_of_the_page_are_those_of_the_json(folder: Path) -> None:
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    page = Page(folder / "report.html")
    (compared,) = content["comparisons"]
    assert [row["name"] for row in compared["rows"]] == ["accuracy", HOSTILE, "colour"]
    for row in compared["rows"]:
        cells = next(cells for cells in page.rows if cells and cells[0].removesuffix(" *") == row["name"])
        assert cells[1] == str(row["records"])
        assert cells[2] == format_score(row["scores"]["base"]["value"], True)
        assert cells[3] == format_score(row["scores"]["adapter"]["value"], True)
        assert cells[4].startswith(f"{row['difference']['value'] * 100:+.1f} [")
        assert cells[7] == f"{row['gained']} / {row['lost']}"
    assert compared["headline"] in page.text
    assert compared["forgetting"][0] in page.text
    assert [cells[0] for cells in page.rows if cells and cells[0].endswith(" *")] == [HOSTILE + " *"]
    assert f"{content['counts']['trained']} of 2,000 parameters are trained (3.00%)." in page.text
    assert ["distance", text(content["verification"]["distance"])] in page.rows
    assert ["seed", "23"] in page.rows
    assert ["language", "plain 40", HOSTILE] in page.rows
    assert ["quiz", "1,234", "1,200"] in page.rows


def test_losses_that_are_not_numbers_are_null_in_the_json_and_left_out_of_the_curve(folder: Path) -> None:
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert content["log"][4]["loss"] is None
    raw, smooth = Page(folder / "report.html").named("polyline")
    assert len(raw["points"].split()) == len(smooth["points"].split()) == 38
    assert "nan" not in raw["points"]


def test_an_unhealthy_run_is_said_with_all_its_reasons(folder: Path) -> None:
    page = Page(folder / "report.html")
    assert "Unhealthy" in page.text
    assert "The loss ends at 7" in page.text
    assert "**unhealthy: " in (folder / "report.md").read_text(encoding="utf-8")


def test_a_healthy_run_is_said_with_its_losses(tmp_path: Path) -> None:
    write_report(tmp_path, ReportContent("run", verdict=Verdict(True, (), 3.0, 0.5, 4.0)))
    words = Page(tmp_path / "report.html").text
    assert "Healthy" in words
    assert "Loss 3.000 to 0.500 (a model that knows nothing has 4.000)" in words


def test_the_ratio_to_the_base_and_the_evidence_of_answers_are_in_the_page_and_in_the_markdown(folder: Path) -> None:
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (compared,) = content["comparisons"]
    said = compared["notes"][0]
    assert said.startswith("The adapter scores 1.43 times the base; an interval of this ratio cannot be given")
    evidence = (
        "Answered by checkpoint c0ffeec0ffee…, base eye ba5eba5eba5e…: tokens 60 (base) and 1,060 (adapter), 6.0 seconds. "
        "The answers are in answers.jsonl, sha256 f0f0f0f0f0f0…"
    )
    page, markdown = Page(folder / "report.html"), (folder / "report.md").read_text(encoding="utf-8")
    for sentence in (said, evidence):
        assert sentence in page.text
        assert sentence in markdown
    assert compared["rows"][0]["ratio"] == {"value": pytest.approx(57 / 40), "low": None, "high": None}
    ratios = {cells[0]: cells[5] for cells in page.rows if len(cells) == 9}
    assert ratios["accuracy"] == "1.43 (no interval)"


def test_parts_that_are_left_out_leave_no_section(tmp_path: Path) -> None:
    write_report(tmp_path, ReportContent("nothing yet"))
    page = Page(tmp_path / "report.html")
    assert page.named("section") == []
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "# nothing yet\n"


def test_a_comparison_without_flips_or_forgetting_is_a_report_too(tmp_path: Path) -> None:
    unchanged = comparison(tmp_path, gained=0, lost=0)
    write_report(tmp_path, ReportContent("same", summary=unchanged.headline, comparisons=[unchanged]))
    page = Page(tmp_path / "report.html")
    assert page.text.count(unchanged.headline) == 1, "a summary that is the headline is not said twice"
    assert page.named("article") == []
    whole = unchanged.rows[0]
    assert whole.difference is not None
    assert any(format_change(whole.difference, True) in cells for cells in page.rows)


def test_markup_escapes_text_and_attributes() -> None:
    assert tag("p", "<b>", tag("i", "&"), class_='"x"') == '<p class="&quot;x&quot;">&lt;b&gt;<i>&amp;</i></p>'
    assert tag("td", Markup("<hr>"), class_=None) == "<td><hr></td>"


def test_long_curves_are_thinned_and_keep_their_mean() -> None:
    points = [(float(step), step % 7 / 7) for step in range(7 * POINTS)]
    few = thin(points)
    assert len(few) == POINTS
    assert sum(loss for _, loss in few) / len(few) == pytest.approx(sum(loss for _, loss in points) / len(points))
    assert thin(points[:9]) == points[:9]
    assert running_mean([4.0, 4.0, 4.0]) == [4.0] * 3


def test_ticks_are_round_numbers_within_the_axis() -> None:
    assert axis_ticks(1, 400, 5) == [100, 200, 300, 400]
    assert axis_ticks(0, 4.4, 4) == [0, 2, 4]
    assert axis_ticks(0, 0.07, 4) == pytest.approx([0, 0.02, 0.04, 0.06])
