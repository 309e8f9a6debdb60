"""Match the patterns of adapters, regular expressions that anybody may have written, in bounds."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from merging.problems import Problems, printable

PLAIN = re.compile(r"[\w.-]*")  # matches in no time, whatever the name is
SECONDS = 10
MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
found = {}
for pattern in patterns:
    try:
        compiled = re.compile(rf"(.*\\.)?({pattern})$")
    except Exception as error:
        sys.exit(str(error) or type(error).__name__)
    for name in names:
        if name not in found and compiled.match(name):
            found[name] = pattern
json.dump(found, sys.stdout)
"""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> dict[str, str | None]:
    """Return for each name the first pattern that matches its end, as peft does it.

    Patterns may take any time and memory: those that are no plain words are matched by a process of
    its own. Raises Problems for a pattern that is no regular expression, or takes too long.
    """
    if all(PLAIN.fullmatch(pattern) for pattern in patterns):
        compiled = {pattern: re.compile(rf"(.*\.)?({pattern})$") for pattern in patterns}
        return {n: next((p for p, c in compiled.items() if c.match(n)), None) for n in names}
    listed = ", ".join(f"alpha_pattern.{printable(pattern)}" for pattern in patterns[:5])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", MATCHER],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise Problems(f"{listed}: takes too long to match") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["stopped"])[-1]
        raise Problems(f"{listed}: not a regular expression: {printable(last)}")
    found = json.loads(done.stdout)
    return {name: found.get(name) for name in names}
