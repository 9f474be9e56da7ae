"""Which choices MMBench's answers are taken for, compared with an installed VLMEvalKit.

    pip install --no-deps ms-vlmeval==0.0.20
    python benchmarks/mmbench_matching.py [--answers 1000000] [--groups 100000] [--seed 0] [--freeze FILE]

Answers and options are made up. Each answer is read by `choose` and by VLMEvalKit's `can_infer`, each group of rotations is
scored by the evaluator and by VLMEvalKit's rule: right if `can_infer` gives the right letter in every round. The functions
alone are taken out of its source, because importing the package needs much else.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import json
import logging
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from graftwork.contracts import Record
from graftwork_mmbench import MmBench, MmBenchSettings, choose
from graftwork_mmbench.answers import FAILED, REFUSALS
from graftwork_mmbench.table import Row, make_record, rotations

Oracle = Callable[[str, dict[str, str]], "str | bool"]
TEXTS = (
    *(
        "a",
        "cat",
        "a cat",
        "cats",
        "The cat",
        "A",
        "b",
        "B",
        "D",
        "Z",
        "nan",
        "None.",
        "no",
        "yes",
        "No.",
        "0",
        "1",
        "10",
    ),
    *("red", "dark red", "Red", "left", "top left", "İstanbul", "Straße", "三", "三角形", "x" * 40, " ", "e", "I"),
    *("The man is to the left of the dog.", "Answer: B", "C. dog", "it is a cat, not a dog", "(A)", "\u00a0", "ﬁsh"),
)
FRAMES = (
    *(
        "{}",
        "{}.",
        "({})",
        "**{}**",
        "{}:",
        "[{}]",
        "#{}",
        "{{{}}}",
        "The correct answer is {}.",
        "Answer: {}",
        "Option {}",
    ),
    *(
        "The answer is {} because the image shows that.",
        "{}. That is what the picture shows",
        "I think it is {}!",
        "`{}`",
    ),
    *(
        "{} is a good answer",
        "It is A {}",
        "A {} stands there",
        "答案是{}",
        "{}\n",
        "\t{}\n\nfor sure",
        "not {}",
        "'{}'",
        "{}?",
    ),
)
WORDS = (
    "A",
    "a",
    "the",
    "B",
    "C",
    "D",
    "E",
    "Z",
    "or",
    "and",
    "is",
    "answer",
    "I",
    "z",
    ".",
    "F",
    "-",
    "cat",
    "red",
    "left",
)


def load_can_infer() -> Oracle:
    """VLMEvalKit's function, out of the installed package's source."""
    package = importlib.util.find_spec("vlmeval")
    if not package or not package.submodule_search_locations:
        sys.exit("VLMEvalKit is not installed: pip install --no-deps ms-vlmeval==0.0.20")
    file = Path(package.submodule_search_locations[0], "utils", "matching_util.py")
    source = ast.parse(file.read_text(encoding="utf-8"))
    source.body = [node for node in source.body if isinstance(node, ast.FunctionDef) and "can_infer" in node.name]
    names: dict[str, Any] = {"cp": copy, "os": os, "re": re, "string": string, "logger": logging.getLogger()}
    exec(compile(source, "matching_util.py", "exec"), names)
    os.environ.pop("VERBOSE", None)  # With it, VLMEvalKit takes another A for an article.
    oracle: Oracle = names["can_infer"]
    return oracle


def make_options(random: Random) -> tuple[str, ...]:
    """Two to eight options, some of which may be missing; often one is a part of another."""
    options = [random.choice(TEXTS) for _ in range(random.choice((2, 3, 4, 4, 4, 4, 5, 6, 8)))]
    if random.random() < 0.3:
        options[random.randrange(len(options))] += random.choice((" ", "s", ".")) + random.choice(TEXTS)
    if random.random() < 0.2:
        options[random.randrange(1, len(options))] = ""
    while not options[-1]:
        options.pop()
    return tuple(options)


def make_answer(random: Random, options: Sequence[str]) -> str:
    """An answer of any kind: letters, texts, both, several, sentences, refusals, noise, nothing."""
    letter = random.choice("ABCDEFGHZ" if random.random() < 0.3 else string.ascii_uppercase[: len(options)])
    text = random.choice(options if random.random() < 0.8 else TEXTS)
    kind = random.randrange(10)
    if kind < 3:
        said = letter
    elif kind < 5:
        said = text
    elif kind == 5:
        said = f"{letter}{random.choice(('. ', ': ', ') ', ' ', ''))}{text}"
    elif kind == 6:
        said = random.choice((" or ", ", ", "", "/", " and ")).join([letter, random.choice([*options, *"ABCD"])])
    elif kind == 7:
        said = " ".join(random.choice([*WORDS, letter, text]) for _ in range(random.randrange(12)))
    elif kind == 8:
        said = random.choice(("", " ", "\n", ".", "?!", *REFUSALS, FAILED)) + random.choice(("", letter, text))
    else:
        said = "".join(random.choice("AaBbCDZ .,:;()[]!*#{}-'\n\u3000") for _ in range(random.randrange(12)))
    if random.random() < 0.5:
        said = random.choice(FRAMES).format(said)
    change = random.choice((str, str, str, str, str, str.lower, str.upper, str.strip, str.title))
    return change(said)


def compare_answers(can_infer: Oracle, random: Random, count: int) -> tuple[int, Counter[str]]:
    """How many answers are taken for another choice, and what they are taken for."""
    different, found = 0, Counter[str]()
    for _ in range(count):
        options = make_options(random)
        answer = make_answer(random, options)
        theirs, ours = ask_oracle(can_infer, answer, options), choose(answer, options)
        found[ours or "none"] += 1
        if ours != theirs:
            different += 1
            print(f"{answer!r} to {options}: {ours} here, {theirs} there", file=sys.stderr)
    return different, found


def compare_groups(can_infer: Oracle, random: Random, count: int) -> tuple[int, int]:
    """How many groups of rotations have another verdict, and how many are right."""
    evaluator, different, right = MmBench(MmBenchSettings()), 0, 0
    for number in range(count):
        options = make_options(random)
        letter = random.choice([each for each, text in zip(string.ascii_uppercase, options, strict=False) if text])
        row = Row("", number, "What is it?", options, letter, "", "", number)
        rounds = list(rotations(row))
        records = [make_record(each, len(rounds), {number: b"image"}, "") for each in rounds]
        frame = random.choice(FRAMES)
        scores, theirs = [], True
        for record in records:
            if not isinstance(record, Record):
                raise AssertionError(record)
            said = (
                make_answer(random, record.meta["options"])
                if random.random() < 0.1
                else frame.format(*record.reference)
            )
            scores.append(evaluator.score(record, said))
            theirs &= ask_oracle(can_infer, said, record.meta["options"]) == record.reference[0]
        ours = evaluator.total(scores)["accuracy"] == 1.0
        right += ours
        different += ours != theirs
    return different, right


def ask_oracle(can_infer: Oracle, answer: str, options: Sequence[str]) -> str | None:
    """The letter that VLMEvalKit tells; it leaves out the options that are missing."""
    choices = {letter: text for letter, text in zip(string.ascii_uppercase, options, strict=False) if text}
    return str(found) if (found := can_infer(answer, choices)) else None


def main() -> None:
    """Print the differences and their number; freeze some of the cases if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=int, default=1_000_000)
    parser.add_argument("--groups", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--freeze", type=Path, help="write some cases with VLMEvalKit's choice into this file instead")
    options = parser.parse_args()
    can_infer, random = load_can_infer(), Random(options.seed)
    if options.freeze:
        asked = [
            (make_answer(random, texts), texts) for texts in (make_options(random) for _ in range(options.answers))
        ]
        cases = [[answer, texts, ask_oracle(can_infer, answer, texts)] for answer, texts in asked]
        lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
        options.freeze.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        return
    different, found = compare_answers(can_infer, random, options.answers)
    print(f"{options.answers:,} answers, {different:,} taken for another choice; taken for {dict(found.most_common())}")
    different, right = compare_groups(can_infer, random, options.groups)
    print(f"{options.groups:,} groups of rotations, {different:,} with another verdict; {right:,} are right")


if __name__ == "__main__":
    main()
