"""Report everything that is wrong with a user's input at once, in one error."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Problems(ValueError):
    """One or more problems of a user's input; the message lists them, sorted."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = sorted(set(problems))
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        one = len(self.problems) == 1
        super().__init__(self.problems[0] if one else f"{len(self.problems)} problems:{listed}")


def refuse(problems: Iterable[str]) -> None:
    """Raise Problems if there are any."""
    if listed := list(problems):
        raise Problems(listed)


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Add what is wrong inside the `with` to a list, and go on after it."""
    try:
        yield
    except Problems as error:
        problems += error.problems
    except (ValueError, OSError) as error:
        problems.append(explain(error))


def explain(error: Exception) -> str:
    """Return an error's message; of a failed system call, the file and the cause."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def some(names: Iterable[str], limit: int = 5) -> str:
    """Return names as text, sorted, the first few and how many more."""
    listed = sorted(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest
