"""FFI targets of other packages, on one rank."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "mpi_cuda"

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def shape_of(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


HANDLER = """
#include "xla/ffi/api/c_api.h"
static XLA_FFI_Error *metadata(XLA_FFI_CallFrame *frame, int *answered) {
  *answered = frame->extension_start &&
              frame->extension_start->type == XLA_FFI_Extension_Metadata;
  if (*answered) {
    XLA_FFI_Metadata *m = ((XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata;
    m->api_version.major_version = XLA_FFI_API_MAJOR;
    m->api_version.minor_version = XLA_FFI_API_MINOR;
  }
  return 0;
}
#define TARGET(name, factor)                                                       \\
  XLA_FFI_Error *name(XLA_FFI_CallFrame *frame) {                                  \\
    int answered;                                                                  \\
    metadata(frame, &answered);                                                    \\
    if (answered) return 0;                                                        \\
    XLA_FFI_Buffer *x = frame->args.args[0], *y = frame->rets.rets[0];             \\
    for (int i = 0; i < x->dims[0]; i++)                                           \\
      ((float *)y->data)[i] = (factor) * ((float *)x->data)[i];                    \\
    return 0;                                                                      \\
  }
TARGET(twice, 2)
TARGET(thrice, 3)
"""


@pytest.fixture(scope="module")
def handlers(tmp_path_factory) -> ctypes.CDLL:
    """Handlers of another package, built for jaxlib's own (newer) FFI version."""
    import jaxlib

    folder = tmp_path_factory.mktemp("ffi")
    (folder / "handler.c").write_text(HANDLER)
    include = Path(jaxlib.__file__).parent / "include"
    library = folder / "handler.so"
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", "-o", library, folder / "handler.c"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def call(target: str) -> np.ndarray:
    x = jnp.arange(3.0)
    return np.asarray(jax.jit(lambda x: jax.ffi.ffi_call(target, shape_of(x))(x))(x))


def test_targets_of_other_packages(handlers: ctypes.CDLL) -> None:
    jax.devices()
    jax.ffi.register_ffi_target("test_twice", jax.ffi.pycapsule(handlers.twice), platform="cpu")
    np.testing.assert_array_equal(call("test_twice"), [0, 2, 4])


def test_a_thousand_targets_and_registering_again(handlers: ctypes.CDLL) -> None:
    for i in range(1024):
        capsule = jax.ffi.pycapsule(handlers.thrice if i % 2 else handlers.twice)
        jax.ffi.register_ffi_target(f"test_many_{i}", capsule, platform="cpu")
    np.testing.assert_array_equal(call("test_many_1023"), [0, 3, 6])
    np.testing.assert_array_equal(call("test_many_0"), [0, 2, 4])


def test_targets_with_stages_are_refused_by_name(handlers: ctypes.CDLL) -> None:
    capsules = {
        "instantiate": jax.ffi.pycapsule(handlers.twice),
        "execute": jax.ffi.pycapsule(handlers.twice),
    }
    jax.ffi.register_ffi_target("test_stages", capsules, platform="cpu")
    with pytest.raises(Exception, match="stages"):
        call("test_stages")
