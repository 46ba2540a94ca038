"""Calls JAX's host callbacks for the library: arrays in C become numpy views and back."""

from __future__ import annotations

import ctypes
import traceback
from typing import Any

import jax
import ml_dtypes
import numpy as np

from mpi_cuda import _library

# XLA_FFI_DataType to numpy (xla/ffi/api/c_api.h); the packed types hold 8 // bits per byte.
DTYPES: dict[int, Any] = {
    1: np.bool_,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.uint8,
    7: np.uint16,
    8: np.uint32,
    9: np.uint64,
    10: np.float16,
    11: np.float32,
    12: np.float64,
    15: np.complex64,
    16: ml_dtypes.bfloat16,
    18: np.complex128,
    19: ml_dtypes.float8_e5m2,
    20: ml_dtypes.float8_e4m3fn,
    21: ml_dtypes.int4,
    22: ml_dtypes.uint4,
    23: ml_dtypes.float8_e4m3b11fnuz,
    24: ml_dtypes.float8_e5m2fnuz,
    25: ml_dtypes.float8_e4m3fnuz,
    26: ml_dtypes.int2,
    27: ml_dtypes.uint2,
    28: ml_dtypes.float8_e4m3,
    29: ml_dtypes.float8_e3m4,
    32: ml_dtypes.float4_e2m1fn,
    33: ml_dtypes.float8_e8m0fnu,
}
TOKEN = 17
PACKED_BITS = {21: 4, 22: 4, 26: 2, 27: 2, 32: 4}


class _Array(ctypes.Structure):
    """`CallbackArray` of the library."""

    _fields_ = [
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
        ("data", ctypes.c_void_p),
    ]

    def shape(self) -> tuple[int, ...]:
        return tuple(self.dims[: self.rank])

    def bytes(self, count: int) -> np.ndarray:
        """The first `count` bytes, as a view."""
        if count == 0:
            return np.empty(0, np.uint8)
        buffer: Any = (ctypes.c_uint8 * count).from_address(self.data)
        return np.frombuffer(buffer, np.uint8)

    def view(self) -> np.ndarray:
        """The array itself, for dtypes that are not packed."""
        dtype, shape = np.dtype(DTYPES[self.dtype]), self.shape()
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self.bytes(count).view(dtype).reshape(shape)

    def read(self) -> np.ndarray | None:
        """What a callback gets: a read-only copy, which it may keep, or None for a token."""
        if self.dtype == TOKEN:
            return None
        bits = PACKED_BITS.get(self.dtype)
        array = self.view().copy() if bits is None else self._unpack(bits)
        array.flags.writeable = False
        return array

    def write(self, value: Any) -> None:
        """Stores what a callback returned, whatever its strides."""
        if self.dtype == TOKEN:
            return
        bits = PACKED_BITS.get(self.dtype)
        if bits is None:
            self.view()[...] = np.asarray(value)
        else:
            self._pack(np.asarray(value), bits)

    def _unpack(self, bits: int) -> np.ndarray:
        shape, per_byte = self.shape(), 8 // bits
        count = int(np.prod(shape, dtype=np.int64))
        packed = self.bytes(-(-count // per_byte))
        # The first element is in the lowest bits.
        parts = [(packed >> (bits * i)) & (2**bits - 1) for i in range(per_byte)]
        flat = np.stack(parts, axis=-1).reshape(-1)[:count]
        dtype = np.dtype(DTYPES[self.dtype])
        return flat.astype(np.uint8).view(dtype).reshape(shape)

    def _pack(self, value: np.ndarray, bits: int) -> None:
        per_byte = 8 // bits
        flat = np.ascontiguousarray(value).view(np.uint8).reshape(-1) & (2**bits - 1)
        padded = np.zeros(-(-flat.size // per_byte) * per_byte, np.uint8)
        padded[: flat.size] = flat
        parts = padded.reshape(-1, per_byte)
        packed = np.zeros(parts.shape[0], np.uint8)
        for i in range(per_byte):
            packed |= parts[:, i] << (bits * i)
        self.bytes(packed.size)[...] = packed


class _Buffer(np.ndarray):
    """What `jax.experimental.buffer_callback` hands over: memory of XLA's, during the call."""

    @property
    def writeable(self) -> bool:
        """Whether this is a result."""
        return self.flags.writeable

    def unsafe_raw_buffer_pointer(self) -> int:
        """The address of the first element."""
        return self.ctypes.data


class _ExecutionContext:
    """What `jax.experimental.buffer_callback` hands to a callback on the CPU."""

    @property
    def stage(self) -> Any:
        """The stage of the call; only the last one calls Python."""
        from jax.experimental.buffer_callback import ExecutionStage

        return ExecutionStage.EXECUTE

    @property
    def stream(self) -> int:
        """The CPU has no stream."""
        raise jax.errors.JaxRuntimeError("XLA FFI GPU context is not available on the CPU")


_TRAMPOLINE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.POINTER(_Array),
    ctypes.c_int,
    ctypes.POINTER(_Array),
    ctypes.c_void_p,
    ctypes.c_size_t,
)


def _call(
    callback: int,
    in_place: int,
    num_args: int,
    args: Any,
    num_rets: int,
    rets: Any,
    error: int,
    error_capacity: int,
) -> int:
    try:
        function = ctypes.cast(callback, ctypes.py_object).value
        if in_place:
            _call_in_place(function, args[:num_args], rets[:num_rets])
            return 1
        results = function(*(array.read() for array in args[:num_args]))
        for array, value in zip(rets[:num_rets], results, strict=True):
            array.write(value)
    except BaseException as exception:
        # Whatever fails from here on makes ctypes return 0, which is a failure too.
        lines = traceback.format_exception(exception)
        text = f"{lines[-1].strip()}\n\nAt:\n{''.join(lines)}".encode(errors="backslashreplace")
        text = text[: error_capacity - 1] + b"\0"
        ctypes.memmove(error, text, len(text))
        return 0
    return 1


def _call_in_place(function: Any, args: Any, rets: Any) -> None:
    """`jax.experimental.buffer_callback`: views, valid during the call, instead of copies."""
    operands = [array.view().view(_Buffer) for array in args]
    for operand in operands:
        operand.flags.writeable = False
    results = [array.view().view(_Buffer) for array in rets]
    function(_ExecutionContext(), *operands, *results)


# Kept alive as long as the library may call it.
_trampoline = _TRAMPOLINE(_call)


def install() -> None:
    """Hands the trampoline to the library."""
    _library.load().mpi_cuda_set_trampoline(ctypes.cast(_trampoline, ctypes.c_void_p))
