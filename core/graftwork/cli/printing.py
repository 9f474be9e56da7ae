"""What commands print for people: scores, comparisons and what a folder is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from graftwork.cli.console import make_table, print_facts

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.checkpoint.learning import LearningMap
    from graftwork.contracts.accounting import FileAccount
    from graftwork.evaluate.comparison import Comparison
    from graftwork.evaluate.evaluation import Result
    from graftwork.foreign.diagnosis import Diagnosis


def print_scores(console: Console, result: Result) -> None:
    """The table of one variant's scores."""
    from graftwork.evaluate.scores import format_score, is_percent

    percent = is_percent(result.rows)
    table = make_table([f"{result.evaluator.name}*", "questions*", "score*", "95% interval*", "always the same answer"])
    for row in result.rows:
        (score,) = row.scores.values()
        bounds = f"{format_score(score.low, percent)} to {format_score(score.high, percent)}" if score.known else "-"
        majority = f"{format_score(row.majority, percent)} ({row.majority_answer})"
        table.add_row(row.name, f"{row.records:,}", format_score(score.value, percent), bounds, majority)
    console.print(table)
    if result.notes:
        console.print("\n" + "\n".join(result.notes), markup=False)


def print_learned(console: Console, learned: LearningMap) -> None:
    """What each role learned, a line each, and what did not."""
    from graftwork.report.learning_wording import findings, role_lines

    lines = [*role_lines(learned)]
    width = max(len(role) for role, _ in lines)
    for number, (role, said) in enumerate(lines):
        console.print(f"  {'' if number else 'learned':8}  {role:{width}}  {said}", markup=False)
    for sentence in findings(learned):
        console.print(f"  {sentence}", style="yellow", markup=False)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """The table of both variants' scores, and what was forgotten."""
    from rich.text import Text

    from graftwork.report.wording import SCORE_HEADERS, score_cells

    columns = [SCORE_HEADERS.index(header) for header in SCORE_HEADERS if not header.startswith("ratio")]
    headers = [comparison.evaluator, *SCORE_HEADERS[1:]]
    table = make_table([f"{headers[column]}{'*' if column < columns[-1] else ''}" for column in columns])
    for row in comparison.rows:
        cells = score_cells(row, comparison)
        table.add_row(*(Text(cells[column]) for column in columns))
    console.print(table)
    gained = sum(flip.gained for flip in comparison.flips)
    console.print("\n" + "\n".join([comparison.headline, *comparison.notes]), markup=False)
    console.print(
        f"{len(comparison.flips)} answers changed sides: {gained} gained, {len(comparison.flips) - gained} lost."
    )
    for sentence in comparison.forgetting:
        console.print(sentence, style="yellow", markup=False)


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """A diagnosis for a person."""
    console.print(f"[bold]{diagnosis.folder}[/bold]: {diagnosis.description}\n", soft_wrap=True)
    print_facts(console, diagnosis_facts(diagnosis))
    for title, lines in (
        ("Not in it", diagnosis.import_plan.missing if diagnosis.import_plan else ()),
        ("Inconsistent", diagnosis.inconsistent),
    ):
        if lines:
            console.print(f"\n[bold]{title}[/bold]")
            for line in lines:
                console.print(f"  - {line}")
    print_accounts(console, diagnosis.accounts)
    if diagnosis.refused:
        console.print(f"\n[red]It cannot be imported:[/red] {diagnosis.refused}.")
    else:
        console.print("\nTo make a checkpoint of it, and verify that:")
        console.print(f"  {diagnosis.command}", soft_wrap=True)
        if diagnosis.import_plan and diagnosis.import_plan.is_full_model and not diagnosis.places["base"].found:
            console.print("With --base DIR it can be compared with the language model that it was trained from.")


def print_accounts(console: Console, accounts: Mapping[str, FileAccount]) -> None:
    """What became of every tensor in the files that were read."""
    if accounts:
        console.print("\n[bold]Tensors[/bold]")
    for file, account in accounts.items():
        console.print(f"  {file}: {account.line()}", soft_wrap=True, highlight=False, markup=False)
        for line in account.reasons():
            console.print(f"    - {line}", soft_wrap=True, highlight=False, markup=False)


def diagnosis_facts(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    """What is known of a foreign folder, a label and a phrase each."""
    if diagnosis.architecture:
        yield "model", diagnosis.architecture
    if diagnosis.import_plan:
        yield from diagnosis.import_plan.facts
    elif diagnosis.adapter:
        yield "adapter", diagnosis.adapter.description
    for what, place in diagnosis.places.items():
        yield "trained from" if what == "base" else f"{what} part", place.line()
    if losses := diagnosis.losses:
        yield "trained", f"{diagnosis.steps:,} steps, loss {losses[0]:.4g} to {losses[-1]:.4g}"
