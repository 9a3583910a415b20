"""A bar for what takes long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]


@contextmanager
def bar(total: float, name: str, wanted: bool) -> Iterator[Callable[[float, str], None]]:
    """``show(done, more)`` while it lasts; nothing is shown where it is not wanted."""
    if not wanted:
        yield lambda done, more="": None
        return
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        raise ValueError("progress: needs rich, not installed here: pip install rich") from None
    columns = (BarColumn(), TextColumn(name + " = {task.completed:.3g} of {task.total:g}"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[more]}"), transient=True) as progress:
        task = progress.add_task("", total=total, more="")
        yield lambda done, more="": progress.update(task, completed=done, **({"more": more} if more else {}))
