"""The records of a .bin file, a ZIP archive: torch maps them by place, unseen."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

LOCAL_HEADER = 30  # bytes, before the name; the lengths of name and extra field end it


def check_records(file: Path) -> None:
    """Raise ValueError if a record is compressed, misplaced or not as large as its tensors say."""
    if not zipfile.is_zipfile(file):
        return
    sizes = {}
    with zipfile.ZipFile(file) as archive, open(file, "rb") as stream:
        for info in archive.infolist():
            stream.seek(info.header_offset)
            header = stream.read(LOCAL_HEADER)
            length = struct.unpack("<H", header[26:28])[0] if len(header) == LOCAL_HEADER else 0
            if header[:4] != b"PK\3\4" or stream.read(length) != info.orig_filename.encode():
                raise ValueError(f"record {info.filename} is not where the archive says")
            if info.compress_type or info.flag_bits & 1 or info.file_size != info.compress_size:
                raise ValueError(f"record {info.filename} is compressed or encrypted, not stored")
            sizes[info.filename] = info.file_size
        for name in sizes:
            if name.endswith("/data.pkl"):
                with archive.open(name) as pickled:
                    claims = _Claims(pickled)
                    claims.load()
                for key, size in claims.sizes.items():
                    held = sizes.get(f"{name.removesuffix('.pkl')}/{key}", 0)
                    if held != size:
                        raise ValueError(f"record {key} has {held} bytes, its tensor needs {size}")


class _Anything(dict[Any, Any]):
    """What stands for any object while a pickle is read for the sizes of its storages."""

    def __init__(self, *arguments: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None: ...


class _Claims(pickle.Unpickler):
    """Reads the sizes in bytes of the storages that a pickle names; imports and calls nothing."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return name if name.endswith("Storage") else _Anything

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count = pid
        dtype = getattr(getattr(torch, kind, None), "dtype", torch.uint8)
        self.sizes[key] = count * dtype.itemsize
        return _Anything()
