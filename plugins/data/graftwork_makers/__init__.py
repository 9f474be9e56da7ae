"""Data operators that make records of what a writer says about images."""

from __future__ import annotations

from typing import Any

from graftwork.contracts import DataOperator, hookimpl
from graftwork_makers.templates import AskTemplates
from graftwork_makers.texts import AnswerQuestions, Describe, QuestionAnswer

__all__ = ["AnswerQuestions", "AskTemplates", "Describe", "QuestionAnswer"]


@hookimpl
def data_operators() -> list[type[DataOperator[Any]]]:
    return [AskTemplates, AnswerQuestions, Describe, QuestionAnswer]
