"""`jnp.from_dlpack` copies what cannot be shared, as on JAX's CPU backend: jaxlib asks a plugin for
a way to share that it does not have, and fails."""

from __future__ import annotations

import ctypes
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxlib import _jax

from mpi_cuda import _library
from mpi_cuda._jax_patches.patch import Patch

PATCHES = (
    Patch(
        what="`from_dlpack` copies what is not aligned, or with `copy=True`",
        used=("jaxlib._jax.dlpack_managed_tensor_to_buffer",),
        without="an error where the memory is not aligned to 64 bytes",
        test="test_from_dlpack_copies_what_it_cannot_share",
    ),
)

#: What XLA:CPU wants of memory that it shares (`xla/backends/cpu/alignment.h`).
ALIGNMENT = 64


class _Tensor(ctypes.Structure):
    """`DLTensor` of DLPack's C header."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """`DLManagedTensorVersioned`, which capsules hold since DLPack 1.0."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


#: Where a capsule's memory has the tensor, by the capsule's name.
_OFFSETS = {b"dltensor": 0, b"dltensor_versioned": _Versioned.tensor.offset}
#: `kDLCPU`.
_HOST = 1
#: The kinds of numbers by `DLDataTypeCode`: numpy's letters, and `ml_dtypes`'s names.
_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}
_NAMES = {
    4: "bfloat16",
    7: "float8_e3m4",
    8: "float8_e4m3",
    9: "float8_e4m3b11fnuz",
    10: "float8_e4m3fn",
    11: "float8_e4m3fnuz",
    12: "float8_e5m2",
    13: "float8_e5m2fnuz",
    14: "float8_e8m0fnu",
}


def install() -> None:
    """Wraps what makes an array of a capsule."""
    original = _jax.dlpack_managed_tensor_to_buffer

    def to_buffer(
        capsule: Any, device: Any, stream: Any = None, copy: bool | None = None, *rest: Any
    ) -> Any:
        if copy is not False and _library.is_ours(getattr(device, "client", None)):
            view = _view(capsule)
            if view is not None and (copy or view.ctypes.data % ALIGNMENT):
                # The capsule is not consumed, and gives the memory back when it is collected.
                return jax.device_put(view.copy(), device)
        return original(capsule, device, stream, copy, *rest)

    setattr(_jax, "dlpack_managed_tensor_to_buffer", to_buffer)  # noqa: B010


def _view(capsule: Any) -> np.ndarray | None:
    """The host memory of a capsule as an array, if numpy can say what is in it."""
    tensor = _tensor(capsule)
    if tensor is None:
        return None
    dtype = _dtype(tensor.code, tensor.bits)
    if dtype is None or tensor.device_type != _HOST or tensor.lanes != 1:
        return None
    shape = tuple(tensor.shape[: tensor.ndim])
    if not tensor.data or 0 in shape:
        return None
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    if strides and any(stride < 0 for stride in strides):
        return None
    elements = strides or np.cumprod((1, *shape[:0:-1]))[::-1]
    end = 1 + sum((size - 1) * stride for size, stride in zip(shape, elements, strict=True))
    memory = (ctypes.c_uint8 * (int(end) * dtype.itemsize)).from_address(
        tensor.data + tensor.byte_offset
    )
    in_bytes = tuple(stride * dtype.itemsize for stride in strides) if strides else None
    return np.ndarray(shape, dtype, memoryview(memory), strides=in_bytes)


def _tensor(capsule: Any) -> _Tensor | None:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    for name, offset in _OFFSETS.items():
        try:
            return _Tensor.from_address(get(capsule, name) + offset)
        except ValueError:
            continue
    return None


def _dtype(code: int, bits: int) -> np.dtype | None:
    if code in _KINDS and bits in (8, 16, 32, 64, 128):
        try:
            return np.dtype(f"{_KINDS[code]}{bits // 8}")
        except TypeError:
            return None
    name = _NAMES.get(code)
    known = getattr(ml_dtypes, name, None) if name else None
    return np.dtype(known) if known and np.dtype(known).itemsize * 8 == bits else None
