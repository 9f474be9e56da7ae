"""Draws what a job tells: sentences, bars in a terminal, tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import singledispatchmethod
from typing import TYPE_CHECKING, Any

from graftwork.cli.printing import print_comparison, print_scores
from graftwork.config.sizes import format_size
from graftwork.contracts.events import CheckpointSaved, MemoryRanOut, RunStarted, StepTaken
from graftwork.jobs.messages import Answering, Compared, Listener, Message, Rehearsing, Scored

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.status import Status

STYLES = {"info": None, "success": "green", "warning": "yellow", "error": "bold red"}
RECENT = 20
"""The steps over which the speed is a mean."""


@contextmanager
def drawing(console: Console) -> Iterator[Listener]:
    """A listener that draws on a console; without a terminal, a run's steps become ten plain lines."""
    pen = Drawing(console)
    try:
        yield pen.tell
    finally:
        pen.close()


class Drawing:
    """What is drawn at the moment: at most one bar or status, below the sentences."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.status: Status | None = None
        self.task: Any = None
        self.rates: list[float] = []

    def close(self) -> None:
        """End what moves."""
        if self.bar:
            self.bar.stop()
        if self.status:
            self.status.stop()
        self.bar = self.status = None

    def open_bar(self, title: str, *columns: Any, transient: bool) -> Progress:
        """A new bar; the previous one ends."""
        from rich.progress import Progress

        self.close()
        hidden = not self.console.is_terminal
        self.bar = Progress(*columns, console=self.console, transient=transient, disable=hidden)
        self.task = self.bar.add_task(title, total=None, facts="")
        self.bar.start()
        return self.bar

    @singledispatchmethod
    def tell(self, message: object) -> None:
        """Draw one event or message; what is not known is not drawn."""

    @tell.register
    def _(self, message: Message) -> None:
        self.end_status()
        self.console.print(message.text, style=STYLES[message.level], markup=False)

    @tell.register
    def _(self, message: Rehearsing) -> None:
        from rich.console import Console

        if self.status is None:
            self.status = Console(stderr=True).status("")
            self.status.start()
        self.status.update(f"rehearsing: {message.strategies}")

    def end_status(self) -> None:
        """A rehearsal is over."""
        if self.status:
            self.status.stop()
            self.status = None

    @tell.register
    def _(self, event: RunStarted) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

        steps, facts = TextColumn("step {task.completed}/{task.total}"), TextColumn("{task.fields[facts]}")
        bar = self.open_bar("training", steps, BarColumn(), facts, TimeRemainingColumn(), transient=False)
        bar.update(self.task, total=event.steps, completed=event.step)
        for note in event.notes:
            self.console.print(f"memory: {note}", style="yellow", markup=False)
        if event.step:
            self.console.print(f"resumed after step {event.step} of {event.steps}")

    @tell.register
    def _(self, event: StepTaken) -> None:
        self.rates.append((event.images or event.tokens) / event.seconds)
        unit = "images" if event.images else "tokens"
        recent = self.rates[-RECENT:]
        facts = f"loss {event.loss:.4f}  lr {event.learning_rate:.2e}  {sum(recent) / len(recent):.0f} {unit}/s"
        if event.memory:
            facts += f"  {format_size(event.memory)}"
        if self.bar:
            self.bar.update(self.task, completed=event.step, facts=facts)
        tenth = max(1, event.steps // 10)
        if not self.console.is_terminal and (event.step % tenth == 0 or event.step in (1, event.steps)):
            self.console.print(f"step {event.step}/{event.steps}  {facts}")

    @tell.register
    def _(self, event: MemoryRanOut) -> None:
        self.console.print(event.sentence, style="yellow", markup=False)

    @tell.register
    def _(self, event: CheckpointSaved) -> None:
        if self.console.is_terminal:
            self.console.print(f"saved {event.folder}", markup=False)
        if self.bar and self.bar.tasks[0].finished:
            self.close()

    @tell.register
    def _(self, message: Answering) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        if self.bar is None:
            title = TextColumn("{task.description}")
            self.open_bar(
                message.evaluator, title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True
            )
        if self.bar:
            self.bar.update(self.task, completed=message.done, total=message.total)
        if message.done == message.total:
            self.close()

    @tell.register
    def _(self, message: Scored) -> None:
        self.close()
        print_scores(self.console, message.result)

    @tell.register
    def _(self, message: Compared) -> None:
        self.close()
        print_comparison(self.console, message.comparison)
