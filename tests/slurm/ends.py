"""How a job ends under Slurm, by the first argument; rank 1 is the one that it happens to."""

import os
import signal
import sys
import time

import jax
import jax.numpy as jnp

import mpi_cuda as m
from mpi_cuda import notoken as mpi

ending = sys.argv[1]
other = m.COMM_WORLD.rank == 1
if other and ending == "raise":
    raise ValueError("before the first use of JAX")
if other and ending == "exit":
    sys.exit(3)
mean = jax.jit(lambda x: mpi.allreduce(x, m.SUM) / m.COMM_WORLD.size)
x = mean(jnp.float32(1)).block_until_ready()
if ending == "circle":
    mpi.recv(x, (m.COMM_WORLD.rank + 1) % m.COMM_WORLD.size).block_until_ready()
if (other and ending == "kill") or (m.COMM_WORLD.rank == 0 and ending == "kill0"):
    os.kill(os.getpid(), signal.SIGKILL)
if ending == "stop":
    m.stop_on()
    for step in range(10_000):
        x = mean(x)
        if step == 20 and other:
            # As sbatch --signal does, but to one rank: it reaches each at another moment.
            os.kill(os.getpid(), signal.SIGTERM)
        if m.stop_requested():
            break
        time.sleep(0.01)
    print("stopped in step", step)
mean(x).block_until_ready()
