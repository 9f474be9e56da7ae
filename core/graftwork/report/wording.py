"""How a report words things: names, numbers, and the facts of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftwork.contracts.plan import Choice, Plan
from graftwork.evaluate.comparison import Comparison
from graftwork.evaluate.scores import ADAPTER, BASE, Row, format_change, format_p, format_ratio, format_score

SCORE_HEADERS = (
    "",
    "questions",
    "base",
    "adapter",
    "difference, 95% interval",
    "ratio, 95% interval",
    "p",
    "gained / lost",
    "majority answer",
)


def words(name: str) -> str:
    """A key as words: `learning_rate` becomes `learning rate`."""
    return name.replace("_", " ")


def text(value: Any) -> str:
    """Any plain value as a person reads it."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{words(str(key))} {text(item)}" for key, item in value.items()) or "–"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(text, value)) or "–"
    return str(value)


def grid(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The headers and the cells of a table; the first row says which columns there are."""
    return [words(key) for key in rows[0]], [[text(row.get(key)) for key in rows[0]] for row in rows]


def score_cells(row: Row, comparison: Comparison) -> tuple[str, ...]:
    """A row of the table of scores, under `SCORE_HEADERS`."""
    percent = comparison.percent
    return (
        row.name,
        f"{row.records:,}" if row.records else "–",
        format_score(row.scores[BASE].value, percent),
        format_score(row.scores[ADAPTER].value, percent),
        format_change(row.difference, percent) if row.difference else "–",
        format_ratio(row.ratio),
        format_p(row.p),
        f"{row.gained:,} / {row.lost:,}",
        f"{format_score(row.majority, percent)} ({row.majority_answer})",
    )


def evidence(provenance: Mapping[str, Any]) -> str:
    """What shows that models answered: whose answers these are, their tokens and time, and the file that holds them."""
    if not provenance.get("answers"):
        return ""
    models = [
        f"{words(key)} {provenance[key][:12]}…" for key in provenance if key == "checkpoint" or key.startswith("base")
    ]
    tokens = " and ".join(f"{count:,} ({variant})" for variant, count in provenance["tokens"].items())
    file = provenance["answers"]
    return (
        f"Answered by {', '.join(models)}: tokens {tokens}, {provenance['seconds']:,.1f} seconds. The answers are in "
        f"{file['file']}, sha256 {file['sha256'][:12]}…"
    )


def counts_sentence(counts: Mapping[str, int]) -> str:
    """How much of a model is trained, or nothing if that is not known."""
    if not counts.get("total"):
        return ""
    total, trained = counts["total"], counts.get("trained", 0)
    return f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})."


def plan_facts(plan: Plan) -> list[tuple[str, str]]:
    """What was trained and how, as pairs of a name and its value."""
    model_spec, run_context = plan.model_spec, plan.run_context
    facts = [("model", choice_text(model_spec.model))]
    facts += [(f"part {part}", choice_text(choice)) for part, choice in model_spec.parts.items()]
    if model_spec.peft:
        facts += [("PEFT method", choice_text(model_spec.peft)), ("adapts", text(model_spec.on))]
    if model_spec.also_train:
        facts.append(("also trains", text(model_spec.also_train)))
    named = {
        "memory strategies": run_context.memory,
        "data sources": run_context.sources,
        "data operators": run_context.operators,
        "evaluators": run_context.evaluate,
    }
    facts += [(name, "; ".join(map(choice_text, choices))) for name, choices in named.items() if choices]
    return [*facts, ("seed", str(run_context.seed))]


def choice_text(choice: Choice) -> str:
    """A component with its version, settings and weights."""
    settings = ", ".join(f"{words(name)} {text(value)}" for name, value in choice.settings.items())
    weights = f"weights {choice.weights.given} (sha256 {choice.weights.sha256[:12]}…)" if choice.weights else ""
    coordinates = f"coordinates {choice.coordinates}" if choice.coordinates else ""
    details = "; ".join(filter(None, [settings, coordinates, weights]))
    return f"{choice.label} {choice.version}" + (f": {details}" if details else "")
