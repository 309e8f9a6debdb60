"""A few rounds of the fuzzer; `python tests/fuzz.py --minutes 60` is the long run.

Of the slow tests of hostile inputs, the Hub's protocol and the emulated device, a sample runs by
default; `ALL_TESTS=1 python -m pytest` runs all.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("needs fork, limits and /proc of Linux", allow_module_level=True)

from contained import Contained, Outcome
from fuzz import Fuzzer, Round, damaged_bytes, damaged_json, judge

ROUNDS = 24


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    work = tmp_path_factory.mktemp("fuzz")
    with Contained({"HF_HOME": str(work / "home")}) as contained:
        yield Fuzzer(1, contained, work)


def test_damaged_inputs_are_refused_or_harmless(fuzzer: Fuzzer) -> None:
    for number in range(ROUNDS):
        fuzzer.step(number)
    assert fuzzer.findings == {}
    assert fuzzer.counts["refused"] > 0
    assert fuzzer.counts["ends well"] > 0


def test_a_round_can_be_repeated(fuzzer: Fuzzer) -> None:
    first, second = fuzzer.round(7), fuzzer.round(7)
    assert first[0].damage == second[0].damage
    assert first[0].arguments == second[0].arguments
    assert first[1].status == second[1].status


def test_the_fuzzer_sees_what_it_looks_for(tmp_path: Path) -> None:
    """What happened is told apart by status, signal, time and what is left."""

    def ended(**facts: object) -> Outcome:
        plain = {"status": 2, "signal": None, "timed_out": False, "seconds": 1.0, "peak": 1}
        return Outcome(**{**plain, "out": "", "err": "error: broken: x\n", **facts})  # type: ignore[arg-type]

    round_ = Round(tmp_path, "main", [], ["broken/config.json, json: lost"])
    assert judge(round_, ended(), {}) is None
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\nKeyError: 1\n'
    for facts, kind in (
        ({"status": 1, "err": trace}, "traceback"),
        ({"status": None, "signal": 7}, "crash"),
        ({"status": None, "signal": 9, "timed_out": True}, "hang"),
        ({"err": ""}, "no message"),
        ({"err": "error: something\n"}, "no culprit"),
        ({"err": "error: broken \x1b[2J\n"}, "message not printable"),
        ({"err": "error: broken\n" + "x\n" * 100}, "long message"),
        ({"status": 0}, "output does not load"),
    ):
        found = judge(round_, ended(**facts), {})
        assert found is not None
        assert found[0] == kind
    (tmp_path / ".out.partial").mkdir()
    assert judge(round_, ended(), {}) == ("left behind", ".out.partial")


def test_damage_is_damage() -> None:
    source = random.Random(0)
    assert (
        sum(damaged_bytes(bytes(range(100)), source)[0] != bytes(range(100)) for _ in range(99))
        > 60
    )
    value = {"a": [1, 2, {"b": "c"}], "d": 4}
    assert sum(damaged_json(value, source)[0] != value for _ in range(99)) > 90
    assert value == {"a": [1, 2, {"b": "c"}], "d": 4}
