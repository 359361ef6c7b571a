"""Reads and writes safetensors files, for torch tensors, numpy arrays and plain buffers, without the library of that name.

That library's writer renames before the bytes are on the disk. Here nothing is copied on a CPU: the writer hands out the
tensors' own memory, the reader answers tensors that are views of the one buffer that was read and verified.
Layout: 8 bytes length of the header (little-endian), the header as JSON padded to 8, the tensors' bytes without gaps.
"""

from __future__ import annotations

import array
import ctypes
import json
import math
import os
import sys
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Optional, Tuple

from . import system

HEADER_BYTES_MAX = 100_000_000
WRITE_BYTES = 64 * 1024 * 1024

#: Bytes per number.
SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "BOOL": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1},
}
_TORCH = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "C64": "complex64"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
_NUMPY = {name: kind for name, kind in _TORCH.items() if not name.startswith(("BF", "F8"))}
_FROM_NUMPY = {kind: name for name, kind in _TORCH.items()}
_CODES = {**dict.fromkeys("bhilqn", "I"), **dict.fromkeys("BHILQN", "U"), **dict.fromkeys("efd", "F")}

_view_of_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of_memory.restype = ctypes.py_object
_view_of_memory.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_READ_ONLY = 0x100


class BadSafetensors(ValueError):
    """The bytes are not a safetensors file."""


@dataclass(frozen=True)
class Buffer:
    """A tensor without a library: kind of number as safetensors names it, shape, and little-endian bytes (any buffer)."""

    dtype: str
    shape: Tuple[int, ...]
    data: memoryview

    def __post_init__(self) -> None:
        view = memoryview(self.data)
        object.__setattr__(self, "data", view if view.format == "B" and view.ndim == 1 else view.cast("B"))

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Buffer) and (self.dtype, self.shape) == (other.dtype, other.shape)
        return same and bytes(self.data) == bytes(other.data)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Leaf:
    """A tensor that is to be written. `form` says what it shall be when it is read: see `restore`."""

    dtype: str
    shape: Tuple[int, ...]
    form: str
    source: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]

    def memory(self) -> tuple[memoryview, Any]:
        """Its bytes, and what must be kept alive while they are used."""
        if self.nbytes == 0:
            return memoryview(b""), None
        if self.form == "torch":
            tensor = self.source.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
            return _view_of_memory(tensor.data_ptr(), self.nbytes, _READ_ONLY), tensor
        if self.form in ("numpy", "scalar"):
            numpy = sys.modules["numpy"]
            array = numpy.ascontiguousarray(self.source)
            array = array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(numpy.uint8)
            return memoryview(array), array
        view = self.source.data if isinstance(self.source, Buffer) else memoryview(self.source)
        return memoryview(view).cast("B"), view


def leaf(value: Any) -> Optional[Leaf]:
    """What a value is as a tensor, or None when it is none; raises TypeError for one that can not be written."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        name = str(value.dtype).replace("torch.", "")
        kind = _FROM_NUMPY.get(name)
        if kind is None:
            raise TypeError(f"a tensor of {name} can not be saved")
        if value.layout != torch.strided or type(value).__name__ == "DTensor" or value.is_meta:
            raise TypeError("a sparse, distributed or meta tensor can not be saved: gather it into a plain one")
        return Leaf(kind, tuple(value.shape), "torch", value)
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        kind = _FROM_NUMPY.get(value.dtype.name)
        if kind is None:
            raise TypeError(f"an array of {value.dtype} can not be saved")
        return Leaf(kind, tuple(value.shape), "numpy" if isinstance(value, numpy.ndarray) else "scalar", value)
    if isinstance(value, Buffer):
        if value.dtype not in SIZES or math.prod(value.shape) * SIZES[value.dtype] != value.data.nbytes:
            raise TypeError(f"a buffer of {value.data.nbytes} bytes is not {value.dtype} of shape {value.shape}")
        return Leaf(value.dtype, value.shape, "buffer", value)
    if isinstance(value, (bytes, bytearray)):
        return Leaf("U8", (len(value),), type(value).__name__, value)
    if isinstance(value, (memoryview, array.array)):
        view = memoryview(value)
        code = view.format.lstrip("@")
        kind = "BOOL" if code == "?" else f"{_CODES.get(code, '?')}{8 * view.itemsize}"
        if kind not in SIZES or not view.c_contiguous:
            raise TypeError(f"a buffer of format `{view.format}` can not be saved")
        return Leaf(kind, tuple(view.shape or ()), "buffer", value)
    return None


def write(path: str, leaves: Mapping[str, Leaf]) -> int:
    """Writes the tensors, in name order but larger numbers first, so that all are aligned; answers the open descriptor.

    Nothing is synced: hash first, and sync then, while the disk is at work already.
    """
    if sys.byteorder != "little":
        raise NotImplementedError("tensors are written on little-endian machines only")
    ordered = sorted(leaves.items(), key=lambda one: (-SIZES[one[1].dtype], one[0]))
    forms = {one.form for one in leaves.values()}
    names = {"torch": "pt", "numpy": "np"}
    header: dict[str, Any] = {"__metadata__": {"format": names.get(forms.pop(), "buffer") if len(forms) == 1 else "mixed"}}
    offset = 0
    for name, one in ordered:
        end = offset + one.nbytes
        header[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_BYTES_MAX:
        raise ValueError(f"the names of {len(leaves)} tensors need a header of {len(text)} bytes")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        system.reserve(fd, 8 + len(text) + offset)
        _write_all(fd, memoryview(len(text).to_bytes(8, "little") + text))
        written = 8 + len(text)
        for _, one in ordered:
            memory, kept = one.memory()
            for begin in range(0, len(memory), WRITE_BYTES):
                part = memory[begin : begin + WRITE_BYTES]
                _write_all(fd, part)
                system.start_writeback(fd, written, len(part))
                written += len(part)
            del memory, kept
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write_all(fd: int, content: memoryview) -> None:
    while len(content):
        content = content[os.write(fd, content) :]


def read(content: bytearray | memoryview) -> tuple[dict[str, Buffer], dict[str, str]]:
    """The tensors of a file that lies in memory, as views of it, in name order, and the file's own notes."""
    whole = memoryview(content)
    if len(whole) < 8:
        raise BadSafetensors("it is shorter than its header's length")
    length = int.from_bytes(whole[:8], "little")
    if length > HEADER_BYTES_MAX or 8 + length > len(whole):
        raise BadSafetensors(f"its header would have {length} bytes")
    try:
        header = json.loads(bytes(whole[8 : 8 + length]).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadSafetensors(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise BadSafetensors("its header is not an object")
    notes = header.pop("__metadata__", None) or {}
    data = whole[8 + length :]
    tensors: dict[str, Buffer] = {}
    spans = []
    for name, about in header.items():
        dtype, shape, (begin, end) = _entry(name, about)
        if end > len(data) or end - begin != math.prod(shape) * SIZES[dtype]:
            raise BadSafetensors(f"tensor `{name}` has wrong offsets")
        spans.append((begin, end))
        tensors[name] = Buffer(dtype, shape, data[begin:end])
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise BadSafetensors("its tensors overlap or leave gaps")
        reached = end
    if reached != len(data):
        raise BadSafetensors("it has bytes that belong to no tensor")
    return dict(sorted(tensors.items())), {str(key): str(value) for key, value in dict(notes).items()}


def _entry(name: str, about: Any) -> tuple[str, Tuple[int, ...], tuple[int, int]]:
    def counts(value: Any) -> list[int]:
        if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
            raise BadSafetensors(f"tensor `{name}` has no shape or no offsets")
        return value

    if not isinstance(about, dict) or about.get("dtype") not in SIZES:
        raise BadSafetensors(f"tensor `{name}` is of no known kind")
    shape, offsets = counts(about.get("shape")), counts(about.get("data_offsets"))
    if len(offsets) != 2:
        raise BadSafetensors(f"tensor `{name}` has no shape or no offsets")
    return about["dtype"], tuple(shape), (offsets[0], offsets[1])


def restore(tensor: Buffer, form: str) -> Any:
    """The tensor in the form it had when it was saved; a `Buffer` where that needs a library which is not there."""
    if form in ("torch", "pt"):
        return _to_torch(tensor)
    if form in ("numpy", "np", "scalar"):
        return _to_numpy(tensor, scalar=form == "scalar")
    if form in ("bytes", "bytearray"):
        return (bytes if form == "bytes" else bytearray)(tensor.data)
    return tensor


def _to_torch(tensor: Buffer) -> Any:
    try:
        import torch
    except ImportError:
        return tensor
    kind = getattr(torch, _TORCH[tensor.dtype], None)
    if kind is None:
        return tensor
    if tensor.data.nbytes == 0:
        return torch.empty(tensor.shape, dtype=kind)
    data = tensor.data
    if data.readonly or _address(data) % SIZES[tensor.dtype]:
        # Other writers may leave tensors unaligned.
        data = memoryview(bytearray(data))
    return torch.frombuffer(data, dtype=kind).reshape(tensor.shape)


def _to_numpy(tensor: Buffer, scalar: bool) -> Any:
    try:
        import numpy
    except ImportError:
        return tensor
    if tensor.dtype not in _NUMPY:
        return tensor
    array = numpy.frombuffer(tensor.data, dtype=numpy.dtype(_NUMPY[tensor.dtype]).newbyteorder("<")).reshape(tensor.shape)
    return array[()] if scalar else array


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def share_out(sizes: Iterable[int], ranks: int) -> list[int]:
    """Shares tensors out over ranks: the largest first, each to the rank with the least so far; answers each one's rank."""
    import heapq

    sizes = list(sizes)
    loads = [(0, rank) for rank in range(max(1, ranks))]
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        load, rank = heapq.heappop(loads)
        owners[index] = rank
        heapq.heappush(loads, (load + sizes[index], rank))
    return owners
