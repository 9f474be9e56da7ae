"""Train both run files with several seeds, ask all variants the same questions, and print one table.

    python examples/smollm2/compare_variants.py [--seeds 17 18] [--steps N] [--questions N] [--out FOLDER]

A run that is in the folder already goes on where it stopped, and what was answered is not asked again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import prepare

from graftwork import weights
from graftwork.build import compose
from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import newest
from graftwork.config import runfile
from graftwork.config.resolve import resolve
from graftwork.config.restore import restore_component
from graftwork.contracts import Assembly, Evaluator, Event, Plan, Prediction, StepTaken, image_key
from graftwork.evaluate import statistics
from graftwork.evaluate.evaluation import evaluate
from graftwork.evaluate.scores import ADAPTER, majority_answer
from graftwork.train.loop import train
from graftwork_registry import Catalog

HERE = Path(__file__).resolve().parent
BASE, CONNECTOR, LORA, MAJORITY = "base", "connector only", "connector and LoRA", "always the most common answer"
RUNS = {CONNECTOR: "connector.toml", LORA: "lora.toml"}
Scores = dict[str, list[list[float]]]
"""By variant, for every seed the score of every question."""


def main() -> None:
    """Prepare, train, ask, print."""
    parser = argparse.ArgumentParser(description="Compare a trained connector with a trained connector and LoRA.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18])
    parser.add_argument("--steps", type=int, help="optimizer steps of each run; by default those of the run files")
    parser.add_argument("--questions", type=int, help="how many are asked; by default those of the run files")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    given = parser.parse_args()
    prepare.main()
    overrides = [f"train.steps={given.steps}"] * bool(given.steps)
    overrides += [f"evaluate.easy-vqa.limit={given.questions}"] * bool(given.questions)
    catalog = Catalog.discover()
    plans = {}
    for variant, file in RUNS.items():
        for seed in given.seeds:
            run = runfile.load(HERE / file, [f"seed={seed}", *overrides])
            plans[variant, seed] = resolve(run, catalog)
    scores: Scores = {BASE: [], CONNECTOR: [], LORA: []}
    seconds: dict[str, list[float]] = {CONNECTOR: [], LORA: []}
    plan = plans[CONNECTOR, given.seeds[0]]
    untrained = compose.build(plan, catalog, device="cpu")
    answered = ask(untrained, plan, catalog, given.out / "base", {"base": "with an untrained connector"})
    scores[BASE].append([one.scores[ADAPTER].value for one in answered])
    del untrained
    for seed in given.seeds:
        for variant in RUNS:
            plan, out = plans[variant, seed], given.out / f"{Path(RUNS[variant]).stem}-{seed}"
            assembly, spent = trained(plan, catalog, out, f"{variant}, seed {seed}")
            hashes = {"checkpoint": weights.sha256(newest(out) / manifest.FILE)}
            answered = ask(assembly, plan, catalog, out / "evaluation", hashes)
            scores[variant].append([one.scores[ADAPTER].value for one in answered])
            seconds[variant].append(spent)
    report(answered, scores, seconds, given.seeds)


def trained(plan: Plan, catalog: Catalog, out: Path, title: str) -> tuple[Assembly, float]:
    """A trained model, and how long its steps took; the end of the script for a run that is not healthy."""

    def listen(event: Event) -> None:
        if isinstance(event, StepTaken) and (event.step % 10 == 0 or event.step == event.steps):
            print(f"{title}: step {event.step}/{event.steps}  loss {event.loss:.3f}", flush=True)

    outcome = train(plan, catalog, out, resume=True, device="cpu", listen=listen)
    print(f"{title}: {outcome.verdict.sentence()}", flush=True)
    if not outcome.verdict.healthy:
        raise SystemExit(1)
    return outcome.assembly, sum(line["seconds"] for line in outcome.log)


def ask(assembly: Assembly, plan: Plan, catalog: Catalog, out: Path, hashes: Mapping[str, str]) -> Sequence[Prediction]:
    """Every question of the plan's evaluator with its answer."""
    evaluator = cast("Evaluator[Any]", restore_component(plan.run_context.evaluate[0], catalog))
    began = time.perf_counter()
    result = evaluate(assembly, evaluator, out=out, hashes=hashes)
    score, spent = result.scores[ADAPTER][evaluator.metric], time.perf_counter() - began
    print(f"{out}: {score:.1%} of {len(result.answered)} questions ({spent:.0f} s)", flush=True)
    return result.answered


def report(
    answered: Sequence[Prediction], scores: Scores, seconds: Mapping[str, Sequence[float]], seeds: Sequence[int]
) -> None:
    """The table, and what LoRA adds."""
    common = majority_answer([one.record for one in answered])
    scores = {**scores, MAJORITY: [[float(common in one.record.reference) for one in answered]]}
    means = {variant: np.mean(np.array(values), axis=0) for variant, values in scores.items()}
    groups = sorted({one.group for one in answered})
    images = len({image_key(one.record) for one in answered})
    print(f"\n{len(answered)} open questions about {images} images of easy-VQA's test split\n")
    names = ["variant", "accuracy, 95% interval", *groups, *(f"seed {seed}" for seed in seeds), "training"]
    rows = [names, ["---"] * len(names)]
    groups_of = np.array([one.group for one in answered])
    for variant, values in means.items():
        row = [
            variant,
            shown(interval(answered, values)),
            *(f"{values[groups_of == group].mean():.1%}" for group in groups),
        ]
        row += [f"{np.mean(each):.1%}" for each in scores[variant]] if variant in seconds else ["–"] * len(seeds)
        row.append(f"{np.mean(seconds[variant]):.0f} s" if variant in seconds else "–")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        fill = "-" if row is rows[1] else " "
        print("| " + " | ".join(cell.ljust(width, fill) for cell, width in zip(row, widths, strict=True)) + " |")
    added = interval(answered, means[LORA] - means[CONNECTOR])
    print(
        f"\nLoRA adds {shown(added, sign='+')} points to the connector alone, on the same questions and with the same seeds."
    )
    print(f"The most common answer is '{common}'. Intervals are of questions (whole images are drawn), not of seeds.")


def interval(answered: Sequence[Prediction], values: Any) -> statistics.Interval:
    """The mean of the questions' values, with the interval of a bootstrap over images."""
    sums: dict[str, list[float]] = {}
    for one, value in zip(answered, values, strict=True):
        pair = sums.setdefault(image_key(one.record), [0.0, 0.0])
        pair[0] += float(value)
        pair[1] += 1
    drawn = statistics.resample_sums(np.array(list(sums.values())))
    return statistics.interval(float(np.mean(values)), drawn[:, 0] / drawn[:, 1])


def shown(number: statistics.Interval, sign: str = "") -> str:
    """`93.5% [90.0, 96.5]`, or with a sign `+12.0 [+8.0, +16.0]`."""
    value, low, high = (100 * (each or 0.0) for each in (number.value, number.low, number.high))
    unit = "" if sign else "%"
    return f"{value:{sign}.1f}{unit} [{low:{sign}.1f}, {high:{sign}.1f}]"


if __name__ == "__main__":
    main()
