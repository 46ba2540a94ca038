"""Custom calls that anybody may write: what does not fit a target is refused, by name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SELF = np.int64(2)
MPI4JAX_COUNTS = {
    "gather": ("sendcount", "recvcount"),
    "reduce": ("nitems",),
}


def call(target: str, result: Any, *operands: Any, **attributes: Any) -> Any:
    """The result of one custom call. Without a side effect only the result has its error."""
    function = jax.ffi.ffi_call(target, result)
    return jax.jit(lambda *xs: function(*xs, **attributes))(*operands)


def refusal(target: str, result: Any, *operands: Any, **attributes: Any) -> str:
    with pytest.raises(Exception) as error:
        jax.block_until_ready(call(target, result, *operands, **attributes))
    text = str(error.value)
    assert f"mpi_cuda: {target}: " in text
    return text


def like(x: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype if dtype is None else dtype)


X = jnp.ones((2, 3), np.float32)
TOKEN = jax.ShapeDtypeStruct((), np.int32)


@pytest.mark.parametrize(
    "target",
    [
        *("mpi_cuda_allreduce", "mpi_cuda_bcast", "mpi_cuda_reduce", "mpi_cuda_scan"),
        *("mpi_cuda_allgather", "mpi_cuda_gather", "mpi_cuda_scatter", "mpi_cuda_alltoall"),
        *("mpi_cuda_exscan", "mpi_cuda_reduce_scatter"),
    ],
)
@pytest.mark.parametrize("dtype", [np.int8, np.int32, jnp.bfloat16, np.complex64])
def test_a_result_of_another_type_is_refused(target: str, dtype: Any) -> None:
    x = jnp.ones(100_000, np.float32)
    for _ in range(3):
        text = refusal(target, like(x, dtype), x, comm=SELF)
    name = np.dtype(dtype).name
    assert f"result 0 is {name}[100000], and must be of float32" in text
    assert "operand 0, which is float32[100000]" in text


@pytest.mark.parametrize("operation", ["gather", "reduce"])
def test_an_empty_result_on_the_root_is_refused(operation: str) -> None:
    attributes = {name: np.int64(X.size) for name in MPI4JAX_COUNTS[operation]}
    if operation == "reduce":
        attributes["op"] = np.int64(0)
    results = [jax.ShapeDtypeStruct((0,), X.dtype), TOKEN]
    with pytest.raises(Exception, match=rf"{operation} .*the result has 0 elements, .*operand's 6"):
        jax.block_until_ready(
            call(f"mpi_{operation}_ffi", results, X, comm=SELF, root=np.int64(0), **attributes)
        )


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("op", np.int8(3), "attribute op is int8 3, and must be an integer of 32 or 64 bits"),
        ("op", np.float32(3), "attribute op is float32 3, and must be"),
        ("op", "MAX", 'attribute op is the string "MAX", and must be'),
        ("op", True, "attribute op is bool true, and must be"),
        ("op", np.arange(3), "attribute op is an array of 3 int64, and must be"),
        ("reduction", np.int64(3), "attribute reduction (int64 3) is not known"),
        ("root", np.int64(0), "its attributes are comm, op"),
        ("mpi_cuda_uniform_1_00ff", np.int64(1), "attribute mpi_cuda_uniform_1_00ff (int64 1) is"),
        ("mpi_cuda_reads_status", np.int64(0), "attribute mpi_cuda_reads_status (int64 0) is not"),
    ],
)
def test_attributes_of_another_name_or_type_are_refused(name: str, value: Any, seen: str) -> None:
    assert seen in refusal("mpi_cuda_allreduce", like(X), X, **{name: value})


@pytest.mark.parametrize("operation", ["allreduce", "scan"])
def test_a_result_in_the_operands_memory_is_refused(operation: str) -> None:
    function = jax.ffi.ffi_call(f"mpi_cuda_{operation}", like(X), input_output_aliases={0: 0})
    with pytest.raises(Exception, match=f"{operation} of .*: the result lies in the operand's"):
        jax.block_until_ready(jax.jit(lambda x: function(x + 1, comm=np.int64(0)))(X))
    result = call(f"mpi_cuda_{operation}", like(X), X, comm=np.int64(0))
    jax.block_until_ready(result)


def test_attributes_of_both_widths_are_taken() -> None:
    for kind in (np.int32, np.uint32, np.int64, np.uint64):
        result = call("mpi_cuda_allreduce", like(X), 2 * X, comm=kind(2), op=kind(3))
        np.testing.assert_array_equal(result, 2 * X)


def test_the_librarys_communicators_are_no_users() -> None:
    for comm in (3, 2**60 + 5):
        text = "communicator of the library's own"
        with pytest.raises(Exception, match=rf"comm={comm} is a {text}"):
            call("mpi_cuda_bcast", like(X), X, comm=np.int64(comm)).block_until_ready()


def test_attributes_of_mpi4jax_are_checked() -> None:
    def allreduce(**attributes: Any) -> str:
        return refusal("mpi_allreduce_ffi", like(X), X, **attributes)

    assert "attribute comm is missing" in allreduce(op=np.int64(0))
    assert "attribute op is int32 0, and must be an int64" in allreduce(comm=SELF, op=np.int32(0))
    wrong = allreduce(comm=SELF, op=np.int64(0), nitems=np.int64(7))
    assert "attribute nitems is 7, and the operand float32[2,3] has 6 elements" in wrong
    assert "its attributes are comm, dtype, nitems, op" in allreduce(root=np.int64(0))


def test_operands_and_results_are_counted_and_typed() -> None:
    cases = [
        (refusal("mpi_cuda_bcast", like(X)), "operand 0 is missing; it must be an array"),
        (
            refusal("mpi_cuda_bcast", like(X), X, X),
            "operand 1 is float32[2,3], and must be a token",
        ),
        (refusal("mpi_cuda_bcast", [like(X), like(X)], X), "result 1 is float32[2,3], and must be"),
        (refusal("mpi_cuda_barrier", like(X)), "result 0 is float32[2,3], and must be a token"),
        (refusal("mpi_cuda_send", like(X), X), "result 0 is float32[2,3], and must be a token"),
        (refusal("mpi_cuda_isend", like(X), X), "result 0 is float32[2,3], and must be a uint32[]"),
        (refusal("mpi_cuda_irecv", like(X), X), "operand 0 is float32[2,3], and must be an empty"),
        (refusal("mpi_cuda_wait", like(X), X), "operand 0 is float32[2,3], and must be a uint32[]"),
        (refusal("mpi_cuda_bcast", like(X, jnp.int4), X), "result 0 is int4[2,3]: a type of less"),
    ]
    for text, wanted in cases:
        assert wanted in text, text
    # With tokens of both kinds it works.
    y, token = call("mpi_cuda_bcast", [like(X), TOKEN], X, jnp.int32(5), comm=SELF)
    np.testing.assert_array_equal(y, X)
    assert token == 0


def test_calls_of_the_librarys_own_targets_are_checked() -> None:
    number = np.int64(5)
    text = refusal("mpi_cuda_collective_begin", TOKEN)
    assert "attribute program is missing" in text
    with pytest.raises(Exception, match="refers to 5, which no program here has"):
        call("mpi_cuda_collective_all_reduce", [like(X), TOKEN], X, jnp.int32(0), op=number,
             table=number)[0].block_until_ready()  # fmt: skip
    text = refusal("mpi_cuda_collective_all_gather", [like(X), TOKEN], X, jnp.int32(0),
                   table=number, outer0=np.int64(0))  # fmt: skip
    assert "attribute outer0 is int64 0, and must be an int64 above 0" in text
    text = refusal("mpi_cuda_async_barrier", like(X))
    assert "result 0 is float32[2,3], and must be a token" in text
