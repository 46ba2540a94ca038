"""Custom calls of the interface before FFI: what JAX's own CPU backend makes of them is wanted."""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import subprocess
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "mpi_cuda"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import serialize_executable
from jax.extend import core
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
from jax.interpreters.mlir import ir
from jaxlib import xla_client

# As such libraries have it: their own copy of XLA's functions, whose symbols nobody exports.
SOURCE = """
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
struct XlaCustomCallStatus_ { std::optional<std::string> message; };
typedef XlaCustomCallStatus_ Status;
static void fail(Status *status, const char *text, size_t length) {
  status->message = std::string(text, length);
}
static void sum(float *out, const void **in) {
  for (int i = 0; i < 6; i++) out[i] = ((float *)in[0])[i] + 10 * ((float *)in[1])[i];
}
static void both(void **out, const void **in) {
  sum((float *)out[0], in);
  for (int i = 0; i < 2; i++) ((int64_t *)out[1])[i] = 7 - i;
}
extern "C" {
void one_1(void *out, const void **in) { sum((float *)out, in); }
void one_2(void *out, const void **in, Status *) { sum((float *)out, in); }
void one_3(void *out, const void **in, const char *, size_t, Status *) { sum((float *)out, in); }
void two_1(void *out, const void **in) { both((void **)out, in); }
void two_2(void *out, const void **in, Status *) { both((void **)out, in); }
void two_3(void *out, const void **in, const char *, size_t, Status *) { both((void **)out, in); }
void tuple_1(void *out, const void **in) { sum((float *)((void **)out)[0], in); }
void tuple_2(void *out, const void **in, Status *) { tuple_1(out, in); }
void tuple_3(void *out, const void **in, const char *, size_t, Status *) { tuple_1(out, in); }
void none_1(void *out, const void **) { *(float *)out = 4; }
void none_2(void *out, const void **, Status *) { *(float *)out = 5; }
void none_3(void *out, const void **, const char *, size_t, Status *) { *(float *)out = 6; }
void opaque(void *out, const void **, const char *text, size_t length, Status *) {
  uint8_t *to = (uint8_t *)out;
  memcpy(to, text, length);
  to[length] = text[length] == 0 ? 42 : 1;
}
void refuses_2(void *out, const void **in, Status *status) {
  sum((float *)out, in);
  if (((float *)out)[0] < 0) fail(status, "less", 4);
}
void refuses_3(void *out, const void **in, const char *text, size_t length, Status *status) {
  sum((float *)out, in);
  if (((float *)out)[0] < 0) fail(status, text, length);
}
void in_place(void *out, const void **in) {
  if (out != in[0]) memcpy(out, in[0], 24);
  for (int i = 0; i < 6; i++) ((float *)out)[i] += 1;
}
}
"""
NAMES = [
    *(f"{kind}_{version}" for kind in ("one", "two", "tuple", "none") for version in (1, 2, 3)),
    *("opaque", "refuses_2", "refuses_3", "in_place"),
]
X = np.arange(6, dtype=np.float32).reshape(2, 3)
ONE = jax.ShapeDtypeStruct((2, 3), np.float32)
SCALAR = jax.ShapeDtypeStruct((), np.float32)


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Half of the targets are registered before JAX starts, as packages do it."""
    folder = tmp_path_factory.mktemp("untyped")
    (folder / "targets.cc").write_text(SOURCE)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-O1", "-o", folder / "targets.so"]
    subprocess.run([*command, folder / "targets.cc"], check=True)
    loaded = ctypes.CDLL(str(folder / "targets.so"))
    half = len(NAMES) // 2
    register(loaded, NAMES[:half])
    jax.devices()
    register(loaded, NAMES[half:])
    return loaded


def register(loaded: ctypes.CDLL, names: list[str]) -> None:
    for name in names:
        capsule = jax.ffi.pycapsule(getattr(loaded, name))
        jax.ffi.register_ffi_target(f"untyped_{name}", capsule, platform="cpu", api_version=0)


def call(name: str, results: Any, version: int, **options: Any) -> Callable[..., Any]:
    target = f"untyped_{name}"
    return jax.ffi.ffi_call(target, results, custom_call_api_version=version, **options)


@functools.cache
def jax_itself() -> Any:
    """The device of a client of JAX's own backend, beside ours."""
    return xla_client.make_cpu_client().devices()[0]


def on_both(program: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """What a program gives on our backend and on JAX's own."""
    results = []
    for device in (jax.devices()[0], jax_itself()):
        placed = [jax.device_put(argument, device) for argument in arguments]
        with jax.default_device(device):
            given = jax.jit(lambda *given: program(*given), **options)(*placed)
        assert all(array.devices() == {device} for array in jax.tree.leaves(given))
        results.append(jax.tree.map(np.asarray, given))
    return results


def check(program: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    ours, wanted = on_both(program, *arguments, **options)
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)
    return ours


@pytest.mark.parametrize("version", [1, 2, 3])
def test_each_convention_has_the_results_of_jax(version: int) -> None:
    assert "MPI ranks" not in jax_itself().client.platform_version
    one = check(call(f"one_{version}", ONE, version), X, X + 1)
    np.testing.assert_array_equal(one, X + 10 * (X + 1))
    two = (ONE, jax.ShapeDtypeStruct((2,), np.int64))
    with jax.enable_x64(True):
        _, seven = check(call(f"two_{version}", two, version), X, X + 1)
    np.testing.assert_array_equal(seven, [7, 6])
    # A list of one result is a result, and not a tuple of one.
    check(call(f"one_{version}", [ONE], version), X, X + 1)
    assert check(call(f"none_{version}", SCALAR, version)) == 3 + version


@pytest.mark.parametrize(
    "text",
    ["", "text", '{"a" = 1 : i64}', bytes(range(256)), b"\0", b"\xff\xfe\0", b"x" * 100_000],
    ids=["empty", "text", "brackets", "all", "nul", "not utf-8", "long"],
)
def test_opaque_text_is_any_bytes(text: str | bytes) -> None:
    raw = text.encode() if isinstance(text, str) else text
    result = jax.ShapeDtypeStruct((len(raw) + 1,), np.uint8)
    given = check(call("opaque", result, 3, legacy_backend_config=text))
    assert given.tobytes() == raw + b"\x2a"


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("text", ["no", "a text of more letters than a short string has"])
def test_a_failure_names_the_target_and_says_what_the_function_said(
    version: int, text: str
) -> None:
    options = {"legacy_backend_config": text} if version == 3 else {}
    function = jax.jit(call(f"refuses_{version}", ONE, version, **options))
    said = text if version == 3 else "less"
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"untyped_refuses_{version}: {said}"):
            function(X - 100, X).block_until_ready()
        np.testing.assert_array_equal(function(X, X), 11 * X)


lowered_p = core.Primitive("untyped_tuple")
lowered_p.def_abstract_eval(lambda x, y, *, version: x)


def lower(ctx: Any, x: Any, y: Any, *, version: int) -> Any:
    """With no attribute more than it takes: version 1 is what is meant where none stands."""
    target = ir.StringAttr.get(f"untyped_tuple_{version}")
    made = stablehlo.CustomCallOp([ir.TupleType.get_tuple([x.type])], [x, y], target)
    if version > 1:
        number = ir.IntegerType.get_signless(32)
        made.operation.attributes["api_version"] = ir.IntegerAttr.get(number, version)
    return [stablehlo.get_tuple_element(made.results[0], 0)]


mlir.register_lowering(lowered_p, lower)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_tuple_of_one_result_is_a_list(version: int) -> None:
    ours = check(lambda x, y: lowered_p.bind(x, y, version=version), X, X)
    np.testing.assert_array_equal(ours, 11 * X)


def test_layouts_are_kept() -> None:
    transposed = check(
        call("one_1", ONE, 1, input_layouts=[(1, 0), (0, 1)], output_layouts=(1, 0)), X, X
    )
    # The function sees the elements in the order of the layouts.
    first, second = X.T.ravel(), X.ravel()
    np.testing.assert_array_equal(transposed, (first + 10 * second).reshape(3, 2).T)


def test_aliases_and_donation_are_kept() -> None:
    function = call("in_place", ONE, 1, input_output_aliases={0: 0})
    check(lambda x: function(x) + x, X)
    check(function, X, donate_argnums=0)
    x = jnp.array(X)
    np.testing.assert_array_equal(jax.jit(function, donate_argnums=0)(x), X + 1)
    assert x.is_deleted()


def test_in_loops_branches_and_vmap() -> None:
    one = call("one_1", ONE, 1, vmap_method="sequential")

    def program(x: Any) -> Any:
        x = lax.fori_loop(0, 5, lambda i, x: one(x, x) % (7.0 + i), x)
        x = lax.cond(x.sum() > 1000, lambda x: x, lambda x: one(x, x + 1), x)
        return jax.vmap(one)(jnp.stack([x, x + 1]), jnp.stack([x + 2, x + 3]))

    check(program, X)
    # Outside of jit, and unused: it may go.
    np.testing.assert_array_equal(one(X, X), 11 * X)


def test_beside_a_typed_target_of_the_same_name(library: ctypes.CDLL) -> None:
    """XLA has a table for each interface. Here the typed target has no handler of its own."""
    with pytest.raises(Exception, match="untyped_one_1 is registered with api_version=0"):
        jax.jit(jax.ffi.ffi_call("untyped_one_1", ONE))(X, X)


def test_the_users_module_is_not_changed() -> None:
    lowered = jax.jit(call("one_2", ONE, 2)).lower(X, X)
    before = lowered.as_text()
    assert "api_version = 2" in before
    for _ in range(2):
        np.testing.assert_array_equal(lowered.compile()(X, X), 11 * X)
    assert lowered.as_text() == before


def test_compiled_programs_are_loaded_again() -> None:
    compiled = jax.jit(call("one_3", ONE, 3)).lower(X, X).compile()
    saved = pickle.loads(pickle.dumps(serialize_executable.serialize(compiled)))
    loaded = serialize_executable.deserialize_and_load(*saved)
    np.testing.assert_array_equal(loaded(X, X), 11 * X)


def test_what_nobody_registered_is_refused_with_the_remedy() -> None:
    with pytest.raises(Exception, match=r"untyped_unknown.*register_ffi_target.*api_version=0"):
        jax.jit(call("unknown", ONE, 2))(X, X)
    with pytest.raises(Exception, match=r"[Uu]nknown custom-call API version"):
        jax.jit(call("one_1", ONE, 0))(X, X)
