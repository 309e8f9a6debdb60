"""Let somebody watch how changes are merged, chunk by chunk, in the pass in which that is done.

For this, `add_to_base` shows the chunks before and after, and methods what they keep of the changes
before they combine them. Nobody watches unless inside a `with watching(...)`, in the same thread.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor


class Watcher(Protocol):
    """Is shown each chunk three times, with its Scratch. It must not change what it sees."""

    def before(
        self, part: slice, origin: Tensor, deltas: Sequence[Tensor], scratch: Any
    ) -> None: ...

    def kept(self, deltas: Sequence[Tensor]) -> None: ...

    def after(self, output: Tensor) -> None: ...


_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watching(watcher: Watcher | None) -> Iterator[None]:
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def current_watcher() -> Watcher | None:
    return _WATCHER.get()


def show_kept(deltas: Sequence[Tensor]) -> None:
    """Show what a method keeps of the changes of a chunk: the rest are zeros."""
    if (watcher := _WATCHER.get()) is not None:
        watcher.kept(deltas)
