"""The collectives of PyTorch/XLA outside of its SPMD mode, and a training step that uses them; run
by `tests/programs/torch_xla` on two ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr


def collectives(rank: int) -> None:
    device = torch_xla.device()
    own = torch.ones(3, device=device) * (rank + 1)

    def equal(found: torch.Tensor, *wanted: float) -> None:
        assert found.cpu().tolist() == list(wanted), (found, wanted)

    equal(xm.all_reduce(xm.REDUCE_SUM, own), 3, 3, 3)
    equal(xm.all_reduce(xm.REDUCE_MAX, own), 2, 2, 2)
    equal(xm.all_reduce(xm.REDUCE_SUM, [own.clone()], scale=0.5)[0], 1.5, 1.5, 1.5)
    equal(xm.all_gather(own), 1, 1, 1, 2, 2, 2)
    numbers = torch.arange(4.0, device=device)
    part = xm.reduce_scatter(xm.REDUCE_SUM, numbers * (rank + 1), 1.0, 0, 2)
    equal(part, *([0, 3] if rank == 0 else [6, 9]))
    swapped = xm.all_to_all(numbers + 10 * rank, 0, 0, 2)
    equal(swapped, *([0, 1, 10, 11] if rank == 0 else [2, 3, 12, 13]))
    equal(xm.collective_permute(own, [[0, 1], [1, 0]]), *[2.0 - rank] * 3)


def training(rank: int) -> None:
    torch.manual_seed(rank)
    model = torch.nn.Linear(3, 1).to("xla")
    xm.broadcast_master_param(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(2, 3).to("xla") * (rank + 1)
    for _ in range(3):
        optimizer.zero_grad()
        ((model(x) - 1) ** 2).mean().backward()
        xm.optimizer_step(optimizer)
        torch_xla.sync()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    both = xm.all_gather(weights).cpu()
    assert torch.equal(both[:4], both[4:]) and both.isfinite().all(), both


def process_group(rank: int) -> None:
    dist.init_process_group("xla", init_method="xla://")
    assert (dist.get_rank(), dist.get_world_size()) == (rank, 2)
    # XLA refuses a program that mixes these with those of `xm`, whose layouts are pinned.
    torch_xla.sync()
    tensor = torch.ones(2, device=torch_xla.device()) * (rank + 1)
    dist.all_reduce(tensor)
    assert tensor.cpu().tolist() == [3, 3], tensor


def main() -> None:
    rank = xr.process_index()
    collectives(rank)
    assert xr.world_size() == 2 and xr.global_ordinal() == rank
    training(rank)
    process_group(rank)
    try:
        torch_xla.launch(print)
    except RuntimeError as error:
        assert "the launcher starts the processes" in str(error) or "already" in str(error), error
    else:
        raise AssertionError("torch_xla.launch has started processes")
    if rank == 0:
        print("2 ranks, the collectives are right")


if __name__ == "__main__":
    main()
