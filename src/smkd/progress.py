"""Progress bars on standard error, if that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """A function that shows the progress over some items: `shown`, or a caller's own."""

    def __call__(self, items: Iterable[T], title: str, total: int, /) -> Iterable[T]:
        """The same items; `total` is how many they are."""


OnProgress = Callable[[str, int, int | None], None]
"""Called with what is going on, how much is done, and of how much if that is known."""


def shown(items: Iterable[T], title: str, total: int) -> Iterable[T]:
    """A `Track` whose bar disappears at the end."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, title, total, console=console, disable=not console.is_terminal, transient=True)


@contextmanager
def bars() -> Iterator[OnProgress]:
    """One bar for each task."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def on_progress(title: str, done: int, total: int | None) -> None:
            if title not in tasks:
                tasks[title] = progress.add_task(title, total=total or 0)
            progress.update(tasks[title], completed=done, total=total or max(done, 1))

        yield on_progress
