"""Report everything that is wrong with a user's input at once, in one ValueError."""

from collections.abc import Iterable, Sequence


def refuse(problems: Sequence[str]) -> None:
    """Raise one ValueError that reports all problems, sorted, if there are any."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in sorted(set(problems)))
        raise ValueError(f"{len(set(problems))} problems:{listed}")


def some(names: Iterable[str], limit: int = 5) -> str:
    """Return names as text, sorted, the first few and how many more."""
    listed = sorted(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest
