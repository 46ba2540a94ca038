"""Trains a small network with PyTorch/XLA, one part of each batch on each rank (SPMD).

PJRT_DEVICE=LIBRARY PJRT_LIBRARY_PATH=.../libpjrt_mpi_cuda.so mpirun -n 2 python torch_xla_train.py

Needs torch and torch_xla 2.9, and nothing of JAX. The last line is the loss, which does not depend
on the number of ranks.
"""

from __future__ import annotations

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr

STEPS, ROWS, FEATURES = 20, 64, 8


def main() -> None:
    xr.use_spmd()
    ranks = xr.global_runtime_device_count()
    mesh = xs.Mesh(np.arange(ranks), (ranks,), ("data",))
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)
    ).to("xla")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Every rank has the whole batch, and computes its rows of it.
    inputs = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(1))
    batch = [tensor.to("xla") for tensor in (inputs, inputs.sum(1, keepdim=True))]
    for tensor in batch:
        xs.mark_sharding(tensor, mesh, ("data", None))
    x, y = batch
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        torch_xla.sync()
    value = loss.item()
    if xr.process_index() == 0:
        print(f"{ranks} ranks, loss {value:.6f}")


if __name__ == "__main__":
    main()
