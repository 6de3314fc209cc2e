"""Collectives of torch.distributed: NCCL between GPUs, gloo between CPU ranks on several hosts."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from ridgewalk.parallel.communicator import CommunicationError


class TorchCollectives:
    """One c10d process group, made directly from a store: no global state, so that a process can hold several."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float, name: str
    ) -> None:
        prefixed = dist.PrefixStore(name, store)
        if device.type == "cuda":
            self._group = dist.ProcessGroupNCCL(prefixed, rank, size, dist.ProcessGroupNCCL.Options())
        else:
            self._group = dist.ProcessGroupGloo(prefixed, rank, size, timedelta(seconds=timeout_s))
        self._rank = rank
        self._size = size
        self._widen = device.type == "cpu"  # gloo would sum BF16 in BF16

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum in place; on CPU narrow payloads travel as FP32. A ring sums each chunk once, so ranks agree exactly."""
        if self._widen and tensor.dtype in (torch.bfloat16, torch.float16):
            wide = tensor.float()
            self._wait(self._group.allreduce, [wide])
            tensor.copy_(wide)
        else:
            self._wait(self._group.allreduce, [tensor])

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """``[size, *tensor.shape]``."""
        stacked = tensor.new_empty((self._size, *tensor.shape))
        self._wait(self._group.allgather, [list(stacked.unbind(0))], [tensor])
        return stacked

    def gather(self, tensor: torch.Tensor, root: int) -> torch.Tensor | None:
        """``[size, *tensor.shape]`` on the root."""
        options = dist.GatherOptions()
        options.rootRank = root
        if self._rank != root:
            self._wait(self._group.gather, [], [tensor], options)
            return None
        stacked = tensor.new_empty((self._size, *tensor.shape))
        self._wait(self._group.gather, [list(stacked.unbind(0))], [tensor], options)
        return stacked

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Overwrite with the root's, in place."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        self._wait(self._group.broadcast, [tensor], options)

    def close(self) -> None:
        """Free the group's connections."""
        self._group.abort()

    def _wait(self, call, *arguments) -> None:
        try:
            call(*arguments).wait()
        except RuntimeError as error:
            raise CommunicationError(f"rank {self._rank}: a peer left the group or did not answer ({error})") from error
