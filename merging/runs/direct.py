"""Write a large file from start to end, past the system's page cache where it can be had.

A merge writes gigabytes that it does not read again. Through the page cache each byte is copied
into memory that must be found first, which can take longer than all the arithmetic of a merge.
"""

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

BUFFER = 1 << 22  # bytes; written when full
AT_ONCE = 1 << 24  # bytes; between them, signals are heard
ALIGNMENT = 4096  # of addresses, positions and sizes in direct writes


class DirectFile:
    """A new file, unbuffered by the system if it and the file system allow it, else ordinary."""

    def __init__(self, path: Path) -> None:
        self._path = path
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
        self._direct = getattr(os, "O_DIRECT", 0)
        try:
            self._descriptor = os.open(path, flags | self._direct, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)
            self._direct = 0
            self._descriptor = os.open(path, flags, 0o666)
        # Buffers, which start at a page: one is filled while the other is written.
        self._memory = [mmap.mmap(-1, BUFFER) for _ in range(2)]
        self._filled = 0
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def write(self, content: Any) -> None:
        """Append the bytes of an object that has the buffer protocol.

        Many bytes that lie in memory as they will in the file are written from there. An error in
        writing others may be raised by a later call, or by `close`.
        """
        rest = np.frombuffer(content, np.uint8) if len(content) else np.empty(0, np.uint8)
        lies_well = (rest.ctypes.data - self._filled) % ALIGNMENT == 0
        if self._direct and lies_well and len(rest) >= BUFFER:
            begin = -self._filled % ALIGNMENT
            end = begin + (len(rest) - begin) // ALIGNMENT * ALIGNMENT
            self._append(rest[:begin])
            self._write_buffers()
            self._flush(rest, begin, end)
            rest = rest[end:]
        self._append(rest)

    def _append(self, rest: Any) -> None:
        """Copy bytes to the buffer, and write it whenever it is full."""
        while len(rest):
            size = min(len(rest), BUFFER - self._filled)
            buffer = np.frombuffer(self._memory[0], np.uint8)
            # By numpy, which lets other threads run meanwhile.
            np.copyto(buffer[self._filled : self._filled + size], rest[:size])
            self._filled += size
            rest = rest[size:]
            if self._filled == BUFFER:
                self._wait()
                self._written = self._writer.submit(self._flush, self._memory[0], 0, BUFFER)
                self._memory.reverse()
                self._filled = 0

    def close(self) -> None:
        """Write what is left and close the file."""
        try:
            if self._filled % ALIGNMENT:
                self._wait()
                self._go_ordinary()
            self._write_buffers()
        finally:
            self._writer.shutdown()
            os.close(self._descriptor)

    def _write_buffers(self) -> None:
        """Write what is in the buffers, of which the second may be on its way."""
        self._wait()
        self._flush(self._memory[0], 0, self._filled)
        self._filled = 0

    def _wait(self) -> None:
        """Wait until the other buffer is written; raise what prevented it."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _flush(self, buffer: Any, start: int, end: int) -> None:
        view = memoryview(buffer)
        while start < end:
            try:
                start += os.write(self._descriptor, view[start : min(end, start + AT_ONCE)])
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise OSError(
                        error.errno, error.strerror, error.filename or str(self._path)
                    ) from error
                self._go_ordinary()

    def _go_ordinary(self) -> None:
        """Go on without direct writes: at the unaligned end, or where they are not supported."""
        if self._direct:
            import fcntl

            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~self._direct)
            self._direct = 0
