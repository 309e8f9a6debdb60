"""What a user can mend, reported at once in one error. Whatever else is raised is a defect."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Problems(Exception):
    """One or more problems of a user's input; the message lists them, sorted."""

    def __init__(self, *problems: str) -> None:
        self.problems = sorted(set(problems))
        listed = "".join(f"\n  - {problem}" for problem in self.problems)
        one = len(self.problems) == 1
        super().__init__(self.problems[0] if one else f"{len(self.problems)} problems:{listed}")


def refuse(problems: Iterable[str]) -> None:
    """Raise Problems if there are any."""
    if listed := list(problems):
        raise Problems(*listed)


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Add what is wrong inside the `with` to a list, and go on after it."""
    try:
        yield
    except Problems as error:
        problems += error.problems
    except OSError as error:
        problems.append(explain(error))


@contextmanager
def reading(model: object, what: str) -> Iterator[None]:
    """Make Problems, with the model's name, of what a library raises about a user's file.

    For the places where libraries touch those: code and parsers may raise anything there.
    """
    try:
        yield
    except Problems:
        raise
    except MemoryError as error:
        raise Problems(f"{model}: {what}: too little memory to read it") from error
    except OSError as error:
        raise Problems(f"{model}: {what}: {explain(error)}") from error
    except (Exception, SystemExit) as error:
        raise Problems(f"{model}: {what}: {cause(error)}") from error


def cause(error: BaseException) -> str:
    """Return an error's message as one line, with its kind if that may say more."""
    message = " ".join(str(error).split())[:500]
    if isinstance(error, ValueError | OSError) and message:
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")


def explain(error: BaseException) -> str:
    """Return an error's message; of a failed system call, the file and the cause."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def printable(text: str, limit: int = 200) -> str:
    """Return a name with its control characters escaped, and without its middle if it is long."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}...({len(text)} characters)...{text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def some(names: Iterable[str], limit: int = 5) -> str:
    """Return names as text, sorted, the first few and how many more."""
    listed = sorted(map(printable, names))
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest
