"""Weight files are read ahead: what is not in memory, while somebody wants it."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from merging.models import reading_ahead
from merging.models.reading_ahead import STEP, load, loading_first

pytestmark = pytest.mark.skipif(not reading_ahead.CAN_LOAD, reason="not known on this system")
SIZE = 5 * STEP + 17
PREADV = os.preadv


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(bytes(SIZE + 100))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def reads(monkeypatch: pytest.MonkeyPatch, held: Callable[[int], bool]) -> list[tuple[int, int]]:
    """Return the list of what is read from now on, as (start, size), of what is not held."""
    done: list[tuple[int, int]] = []

    def preadv(descriptor: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        if flags:
            assert (flags, len(buffers[0])) == (os.RWF_NOWAIT, 1)
            if not held(at):
                raise BlockingIOError(errno.EAGAIN, "not in memory")
            return 1
        size = PREADV(descriptor, buffers, at)
        done.append((at, size))
        return size

    monkeypatch.setattr(os, "preadv", preadv)
    return done


def test_what_is_not_in_memory_is_read(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done = reads(monkeypatch, lambda at: at // STEP in (1, 3))
    load(file, 30, SIZE, lambda: False)
    assert done == [(30 + STEP * i, 17 if i == 5 else STEP) for i in (0, 2, 4, 5)]


def test_nothing_is_read_after_the_end(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done = reads(monkeypatch, lambda at: False)
    load(file, 0, SIZE, lambda: len(done) == 2)
    assert done == [(0, STEP), (STEP, STEP)]


def test_first_parts_are_read_until_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, loaded = threading.Event(), []

    def load(descriptor: int, start: int, size: int, is_over: Callable[[], bool]) -> None:
        loaded.append((start, size, is_over(), is_over))
        begun.set()

    monkeypatch.setattr(reading_ahead, "load", load)
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    with loading_first([tmp_path]):
        assert begun.wait(60)
    assert [parts[:3] for parts in loaded] == [(0, 1000, False)]
    assert loaded[0][3]()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EIO])
def test_systems_that_cannot_tell_are_asked(
    code: int, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def preadv(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    def fadvise(descriptor: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((start, size))

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    load(file, 0, SIZE, lambda: False)
    assert asked == [(STEP * i, STEP) for i in range(6)] * (code == errno.EOPNOTSUPP)


def test_a_file_is_in_memory_after_it_was_loaded(file: int) -> None:
    try:
        PREADV(file, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            pytest.skip("not known on this file system")
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)  # which it may do, or not
    load(file, 0, SIZE, lambda: False)
    for at in range(0, SIZE, 4096):
        assert PREADV(file, [bytearray(1)], at, os.RWF_NOWAIT) == 1
