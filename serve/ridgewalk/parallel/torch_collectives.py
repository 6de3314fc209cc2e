"""Collectives of torch.distributed: NCCL between GPUs, gloo between CPU ranks on several hosts."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from ridgewalk.parallel.communicator import CommunicationError
from ridgewalk.parallel.peers import Peers


def make_group(
    store: dist.Store, name: str, index: int, size: int, device: torch.device, timeout_s: float
) -> dist.ProcessGroup:
    """A c10d process group made directly from a store: no global state, so that a process can hold several."""
    prefixed = dist.PrefixStore(name, store)
    if device.type == "cuda":
        return dist.ProcessGroupNCCL(prefixed, index, size, dist.ProcessGroupNCCL.Options())
    return dist.ProcessGroupGloo(prefixed, index, size, timedelta(seconds=timeout_s))


class TorchCollectives:
    """The collectives of one process group."""

    def __init__(self, group: dist.ProcessGroup, peers: Peers, device: torch.device) -> None:
        self._group = group
        self._peers = peers
        self._on_gpu = device.type == "cuda"

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum in place; gloo would sum BF16 in BF16, so narrow payloads travel as FP32 there. A ring sums each chunk
        once, so ranks agree exactly."""
        if not self._on_gpu and tensor.dtype in (torch.bfloat16, torch.float16):
            wide = tensor.float()
            self._wait(self._group.allreduce, [wide])
            tensor.copy_(wide)
        else:
            self._wait(self._group.allreduce, [tensor])

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """``[size, *tensor.shape]``."""
        stacked = tensor.new_empty((self._peers.size, *tensor.shape))
        self._wait(self._group.allgather, [list(stacked.unbind(0))], [tensor])
        return stacked

    def gather(self, tensor: torch.Tensor, root: int) -> torch.Tensor | None:
        """``[size, *tensor.shape]`` on the root."""
        options = dist.GatherOptions()
        options.rootRank = root
        if self._peers.index != root:
            self._wait(self._group.gather, [], [tensor], options)
            return None
        stacked = tensor.new_empty((self._peers.size, *tensor.shape))
        self._wait(self._group.gather, [list(stacked.unbind(0))], [tensor], options)
        return stacked

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Overwrite with the root's, in place."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        self._wait(self._group.broadcast, [tensor], options)

    def all_to_all(self, rows: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The counts first, then exactly the rows; on GPUs the counts come to the host in between."""
        sent = counts.tolist()
        if sum(sent) != len(rows) or min(sent) < 0:
            raise ValueError(f"{len(rows)} rows, but the counts by destination are {sent}")
        counts = counts.to(rows.device)
        received = torch.empty_like(counts)
        self._wait(self._group.alltoall_base, received, counts, [], [])
        received = received.cpu()
        sources = received.tolist()
        arrived = rows.new_empty((sum(sources), rows.shape[1]))
        self._wait(self._group.alltoall_base, _as_bytes(arrived), _as_bytes(rows), sources, sent)
        return arrived, received

    def close(self) -> None:
        """Free the group's connections."""
        self._group.abort()
        self._peers.close()

    def _wait(self, call, *arguments) -> None:
        try:
            call(*arguments).wait()
        except RuntimeError as error:
            raise CommunicationError(f"rank {self._peers.rank}: {self._peers.who_is_lost()} ({error})") from error


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """Gloo's all-to-all does not know every dtype."""
    return rows.view(torch.uint8)
