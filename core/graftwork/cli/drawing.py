"""Draws what a job reports: sentences, progress bars in a terminal, tables."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import singledispatchmethod
from typing import TYPE_CHECKING, Any

from graftwork.cli.console import progress_console
from graftwork.cli.printing import print_comparison, print_scores
from graftwork.config.sizes import format_size
from graftwork.contracts.events import (
    CheckpointSaved,
    NotLearning,
    RunEnded,
    RunStarted,
    RunStopped,
    RunWarned,
    StepTaken,
)
from graftwork.jobs.messages import Answering, Checking, Listener, Looking, Message, Rehearsing, WaitingForReplies
from graftwork.jobs.results import Compared, Scored

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.status import Status

STYLES = {"info": None, "success": "green", "warning": "yellow", "error": "bold red"}
RECENT = 20
"""The speed is a mean over so many steps."""


@contextmanager
def drawing(console: Console) -> Iterator[Listener]:
    """A listener that draws on a console; without a terminal, a run's steps become about ten plain lines."""
    artist = Drawing(console)
    try:
        yield artist.draw
    finally:
        artist.close()


class Drawing:
    """What is on the screen at the moment: at most one progress bar or one status line, below the sentences."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.title = ""
        """What the bar shows the progress of."""
        self.task: Any = None
        self.status: Status | None = None
        self.rates: deque[float] = deque(maxlen=RECENT)

    def close(self) -> None:
        """End the bar and the status line."""
        self.close_status()
        if self.bar:
            self.bar.stop()
            self.bar = None

    def close_status(self) -> None:
        """End the status line."""
        if self.status:
            self.status.stop()
            self.status = None

    def open_bar(self, title: str, *columns: Any, transient: bool) -> Progress:
        """A new bar; the previous one ends."""
        from rich.progress import Progress

        self.close()
        self.title = title
        hidden = not self.console.is_terminal
        self.bar = Progress(*columns, console=self.console, transient=transient, disable=hidden)
        self.task = self.bar.add_task(title, total=None, facts="")
        self.bar.start()
        return self.bar

    @singledispatchmethod
    def draw(self, message: object) -> None:
        """Draw one event or message; those of other types are ignored."""

    @draw.register
    def _(self, message: Message) -> None:
        self.close_status()
        self.console.print(message.text, style=STYLES[message.level], markup=False)

    def show_status(self, text: str) -> None:
        """A status line, which the next one replaces."""
        if self.status is None:
            self.status = progress_console(quiet=True).status("")
            self.status.start()
        self.status.update(text)

    @draw.register
    def _(self, message: Looking) -> None:
        self.show_status(f"looking at {message.what}")

    @draw.register
    def _(self, message: Rehearsing) -> None:
        self.show_status(f"rehearsing: {message.strategies}")

    @draw.register
    def _(self, message: WaitingForReplies) -> None:
        self.show_status(f"{message.stage}: {message.replies:,} replies")

    @draw.register
    def _(self, event: RunStarted) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

        steps, facts = TextColumn("step {task.completed}/{task.total}"), TextColumn("{task.fields[facts]}")
        bar = self.open_bar("training", steps, BarColumn(), facts, TimeRemainingColumn(), transient=False)
        bar.update(self.task, total=event.steps, completed=event.step)
        self.rates.clear()
        for note in event.notes:
            self.console.print(f"memory: {note}", style="yellow", markup=False)
        for warning in event.warnings:
            self.console.print(warning, style="yellow", markup=False)
        if event.step:
            self.console.print(f"resumed after step {event.step} of {event.steps}")

    @draw.register
    def _(self, event: StepTaken) -> None:
        unit, count = ("images", event.images) if event.images else ("tokens", event.tokens)
        self.rates.append(count / event.seconds)
        speed = sum(self.rates) / len(self.rates)
        facts = f"loss {event.loss:.4f}  lr {event.learning_rate:.2e}  {speed:.0f} {unit}/s"
        if event.memory:
            facts += f"  {format_size(event.memory)}"
        if self.bar:
            self.bar.update(self.task, total=event.steps, completed=event.step, facts=facts)
        tenth = max(1, event.steps // 10)
        if not self.console.is_terminal and (event.step % tenth == 0 or event.step in (1, event.steps)):
            self.console.print(f"step {event.step}/{event.steps}  {facts}")

    @draw.register
    def _(self, event: RunWarned) -> None:
        self.console.print(event.sentence, style="yellow", markup=False)

    @draw.register
    def _(self, event: NotLearning) -> None:
        for finding in event.findings:
            self.console.print(f"after step {event.step}: {finding}", style="yellow", markup=False)

    @draw.register
    def _(self, event: CheckpointSaved) -> None:
        if self.console.is_terminal:
            self.console.print(f"saved {event.folder}", markup=False)

    @draw.register
    def _(self, event: RunEnded | RunStopped) -> None:
        self.close()

    @draw.register
    def _(self, message: Answering) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        bar = self.bar
        if bar is None or self.title != message.evaluator:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            bar = self.open_bar(message.evaluator, *columns, transient=True)
        bar.update(self.task, completed=message.done, total=message.total)
        if message.done == message.total:
            self.close()

    @draw.register
    def _(self, message: Checking) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        if self.bar is None:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self.open_bar("records", *columns, transient=True)
        assert self.bar is not None
        self.bar.update(self.task, completed=message.done, total=message.total)
        if message.done == message.total:
            self.close()

    @draw.register
    def _(self, message: Scored) -> None:
        self.close()
        print_scores(self.console, message.result)

    @draw.register
    def _(self, message: Compared) -> None:
        self.close()
        print_comparison(self.console, message.comparison)
