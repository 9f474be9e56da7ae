"""How it is asked back, and when a writer's yes counts."""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.contracts import setting
from graftwork.data import NO, YES


@dataclass(frozen=True)
class RoundTripSettings:
    """How it is asked back, and when a writer's yes counts."""

    question: str = setting(
        "Question: {question} Proposed answer: {answer} Is the proposed answer correct? Answer yes or no.",
        "What the writer is asked about each {answer}, and {question}; in another phrasing than that of the record",
    )
    questions: dict[str, str] = setting({}, "The same for single groups, such as colour = 'is the shape {answer}?'")
    yes: tuple[str, ...] = setting(YES, "The words that a reply begins with that affirms")
    no: tuple[str, ...] = setting(NO, "The words that a reply begins with that denies")
    max_control: float = setting(
        0.05, "The share of wrong answers that may be affirmed, in a group and of each answer", minimum=0.0, maximum=1.0
    )
    min_gap: float = setting(
        0.20,
        "By how much the share of answers that are affirmed must exceed that of wrong ones",
        minimum=0.0,
        maximum=1.0,
    )
    min_control: int = setting(
        60, "How many wrong answers must be asked about before anything is vouched for", minimum=1
    )
    given: bool = setting(False, "Also verify records that no operator made, such as labels of unknown quality")
    max_new_tokens: int = setting(8, "The longest reply, in tokens", minimum=1)
