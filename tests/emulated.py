"""An accelerator that is emulated on the CPU, so that the device path runs where there is none.

    with emulated() as device:
        merged = linear(tensors, [0.5, 0.5], device=torch.device("cuda"))
    assert {copy.dtype for copy in device.uploads} == {torch.bfloat16}

While the `with` lasts, PyTorch believes in a device called cuda. A tensor there is a wrapper whose
values lie in a CPU tensor that only this module sees, and every operation on it is computed there,
so results are the CPU's. What is not the CPU's is kept up: values cross only by copies, which are
recorded; an operation on tensors of both devices is an error; what a real device would have to be
waited for is recorded as a synchronisation; and memory may be bounded, so that it runs out.

Not emulated: the rounding and order of a device's own kernels, which operations and dtypes it
lacks, streams and asynchronous errors, random generators, and time.
"""

import contextlib
import ctypes
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
CUDA_GUARD, META_GUARD = 1, 14  # in PyTorch's table of devices
GUARD_LIBRARY = "libc10.dylib" if sys.platform == "darwin" else "libc10.so"

# Operations whose result, or its shape, the host must wait for.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "is_nonzero", "unique",
    "_unique2", "unique_dim", "unique_consecutive", "histc", "repeat_interleave",
    "allclose", "item",
}  # fmt: skip
# Operations that may take tensors of both devices.
CROSSING = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize", "set_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # by indices of the CPU


class Copy(NamedTuple):
    """A copy between the host and the device: what crossed the bus, in its dtype there."""

    dtype: torch.dtype
    elements: int

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass
class Record:
    """What was done with an emulated device, and what its memory holds."""

    memory: int | None = None  # bytes; more are refused
    uploads: list[Copy] = field(default_factory=list)
    downloads: list[Copy] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)  # operations that the host had to wait for
    operations: Counter[str] = field(default_factory=Counter)
    threads: set[int] = field(default_factory=set)
    refusals: int = 0  # times that memory ran out
    held: int = 0
    peak: int = 0
    fail_at: int | None = None  # the number of an allocation that finds no memory, from 0
    allocations: int = 0
    _storages: dict[int, list[int]] = field(default_factory=dict)  # address: wrappers, bytes
    _lock: Any = field(default_factory=threading.RLock)

    @property
    def synchronizations(self) -> int:
        """How often the host had to wait for the device: for values, and for copies to it."""
        return len(self.waits) + len(self.downloads)

    def clear(self) -> None:
        """Forget what was done so far, but not what is held."""
        for log in (self.uploads, self.downloads, self.waits, self.operations, self.threads):
            log.clear()
        self.refusals = self.allocations = 0
        self.peak = self.held

    def allocate(self, tensor: Tensor) -> int:
        """Count the storage of a new tensor; OutOfMemoryError where there is no room for it."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        with self._lock:
            if address in self._storages:
                self._storages[address][0] += 1
                return address
            number, self.allocations = self.allocations, self.allocations + 1
            full = self.memory is not None and self.held + size > self.memory
            if full or number == self.fail_at:
                self.refusals += 1
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size} bytes. (emulated)"
                )
            if address:
                self._storages[address] = [1, size]
                self.held += size
                self.peak = max(self.peak, self.held)
        return address

    def release(self, address: int) -> None:
        with self._lock:
            if address in self._storages:
                self._storages[address][0] -= 1
                if not self._storages[address][0]:
                    self.held -= self._storages.pop(address)[1]


class OnDevice(Tensor):
    """A tensor on the emulated device: no values of its own, which lie in `.values`."""

    values: Tensor
    record: Record
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor, record: Record) -> "OnDevice":
        address = record.allocate(values)
        wrapper: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        wrapper.values, wrapper.record = values, record
        # The values live on until the finalizer has run, so that no other storage has its address.
        weakref.finalize(wrapper, _forget, record, address, values).atexit = False
        return wrapper

    def tolist(self) -> Any:
        return self.to(CPU).tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy (emulated)")

    def __repr__(self, **options: Any) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, OnDevice)]
        return _compute(given[0].record, func, args, kwargs or {})


def _forget(record: Record, address: int, values: Tensor) -> None:
    record.release(address)


class _Mode(TorchDispatchMode):
    """Catches what no tensor of the device takes part in: what makes one."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _compute(self.record, func, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Gives the device its number where a caller says cuda; PyTorch would ask a driver for it."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.device:
            return func(*args, **kwargs or {})
        if func is Tensor.cuda:
            return args[0].to(DEVICE)
        if func is Tensor.pin_memory:
            return args[0]
        options = {key: _numbered(value) for key, value in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and options.get("device") == DEVICE:
            return func(*args, **options | {"device": CPU}).to(DEVICE)
        return func(*map(_numbered, args), **options)


def _numbered(value: Any) -> Any:
    is_name = isinstance(value, torch.device) and value.type == DEVICE.type
    return DEVICE if is_name or isinstance(value, str) and value == DEVICE.type else value


def _compute(record: Record, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do an operation on the CPU tensors in its arguments, and put results where they belong."""
    name = func.overloadpacket.__name__
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    theirs = [t for t in tensors if isinstance(t, OnDevice)]
    asked = kwargs.get("device")
    target = torch.device(asked) if asked is not None else None
    if not theirs and (target is None or target.type != DEVICE.type):
        return func(*args, **kwargs)
    with record._lock:
        record.operations[name] += 1
        record.threads.add(threading.get_ident())
    if name not in CROSSING:
        _check_devices(name, tensors)
    _log(record, name, args, theirs, target)
    kwargs = {key: _unwrapped(value) for key, value in kwargs.items()}
    if target is not None:
        kwargs["device"] = target if target.type != DEVICE.type else CPU
    kwargs.pop("pin_memory", None)
    unwrapped = tree_map(_unwrapped, args)
    result = func(*unwrapped, **kwargs)
    if name == "_local_scalar_dense" or not isinstance(result, Tensor | tuple | list):
        return result
    wrappers = {id(t.values): t for t in theirs}
    stays = target is None or target.type == DEVICE.type

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in wrappers:  # done in place
            return _as_before(wrappers[id(value)])
        if name in CROSSING and any(value is t for t in tensors):  # copied into a CPU tensor
            return value
        return OnDevice(value, record) if stays else value

    return tree_map(wrapped, result)


def _as_before(wrapper: OnDevice) -> OnDevice:
    assert wrapper.shape == wrapper.values.shape, "a tensor was resized in place: not emulated"
    return wrapper


def _unwrapped(value: Any) -> Any:
    return value.values if isinstance(value, OnDevice) else value


def _check_devices(name: str, tensors: list[Tensor]) -> None:
    """Refuse what PyTorch refuses: operations on tensors of two devices, but for CPU scalars."""
    mixed = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim]
    if name in INDEXING and not isinstance(tensors[0], OnDevice) or mixed and name not in INDEXING:
        if len({isinstance(t, OnDevice) for t in tensors if t.ndim}) > 1:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found at least two "
                "devices, cuda:0 and cpu! (emulated)"
            )


def _log(
    record: Record,
    name: str,
    args: tuple[Any, ...],
    theirs: list[OnDevice],
    target: torch.device | None,
) -> None:
    """Record copies between host and device, and what the host has to wait for."""
    with record._lock:
        if name == "copy_":
            here, source = args[0], args[1]
            if isinstance(here, OnDevice) and not isinstance(source, OnDevice):
                record.uploads.append(Copy(source.dtype, source.numel()))
            elif isinstance(source, OnDevice) and not isinstance(here, OnDevice):
                record.downloads.append(Copy(source.dtype, source.numel()))
        elif name in ("_to_copy", "lift_fresh_copy") and target is not None:
            source = args[0]
            if isinstance(source, OnDevice) and target.type != DEVICE.type:
                record.downloads.append(Copy(source.dtype, source.numel()))
            elif not isinstance(source, OnDevice) and target.type == DEVICE.type:
                record.uploads.append(Copy(source.dtype, source.numel()))
        elif name in WAITING and theirs or _by_mask(name, args):
            record.waits.append(name)


def _by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an indexing is by a mask on the device, whose count must be known."""
    if name not in INDEXING:
        return False
    return any(isinstance(i, OnDevice) and i.dtype == torch.bool for i in args[1] or ())


def _set_device_guard() -> None:
    """Let PyTorch switch to devices called cuda, which a build without CUDA refuses.

    Its table of guards has one for the meta device, which does nothing; that stands for cuda's.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / GUARD_LIBRARY))
    table = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if not table[CUDA_GUARD]:
        table[CUDA_GUARD] = table[META_GUARD]


@contextlib.contextmanager
def emulated(memory: int | None = None, fail_at: int | None = None) -> Iterator[Record]:
    """Have an emulated device called cuda, in all threads that start meanwhile, and in this one.

    With `memory`, so many bytes of it; with `fail_at`, the allocation of that number (from 0)
    finds no memory, as if another process had taken it for a moment.
    """
    if torch.cuda.is_available():
        raise RuntimeError("there is a real device; use that")
    record = Record(memory, fail_at=fail_at)
    _set_device_guard()
    run = threading.Thread.run

    def run_with_device(thread: threading.Thread) -> None:
        with _Names(), _Mode(record):
            run(thread)

    def synchronize(device: object = None) -> None:
        record.waits.append("synchronize")

    stubs: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "emulated",
        "empty_cache": lambda: None,
        "synchronize": synchronize,
        "mem_get_info": lambda device=None: (
            (memory or 1 << 40) - record.held,
            memory or 1 << 40,
        ),
    }
    with contextlib.ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_with_device))
        stack.enter_context(_Names())
        stack.enter_context(_Mode(record))
        yield record
