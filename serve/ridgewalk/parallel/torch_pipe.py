"""The pipe of a stage link through torch.distributed: NCCL between GPUs, gloo between CPU ranks on several hosts."""

from __future__ import annotations

import time
from collections import deque

import torch
import torch.distributed as dist

from ridgewalk.parallel.call_timer import num_bytes
from ridgewalk.parallel.communicator import CommunicationError
from ridgewalk.parallel.peers import Peers

MAX_AHEAD = 4
"""Tensors that a sender may be ahead of the receiver."""

_TAG = 0


class TorchPipe:
    """One end of a process group of two; the first sends, the second receives. A `Pipe`.

    A message of eight bytes, the tensor's size, goes ahead of every tensor: until it comes the receiver waits, after
    that it receives. Sends are kept, with copies of their tensors, until the receiver has taken them.
    """

    def __init__(self, group: dist.ProcessGroup, peers: Peers, device: torch.device) -> None:
        self._group = group
        self._peers = peers
        self._other = 1 - peers.index
        self._device = device
        self._sent: deque[list[tuple[dist.Work, torch.Tensor]]] = deque()
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # of the GPU, not yet added up
        self._size = torch.empty(1, dtype=torch.int64, device=device)
        self._bubble_seconds = 0.0

    @property
    def bubble_seconds(self) -> float:
        """Time that `await_input` waited; on a GPU, as far as its stream has come."""
        while self._waits and self._waits[0][1].query():
            started, ended = self._waits.popleft()
            self._bubble_seconds += started.elapsed_time(ended) / 1e3
        return self._bubble_seconds

    def send(self, tensor: torch.Tensor) -> None:
        """Start sending a copy; waits while `MAX_AHEAD` tensors are under way."""
        if len(self._sent) == MAX_AHEAD:
            for work, _ in self._sent.popleft():
                self._finish(work)
        messages = [torch.tensor([num_bytes(tensor)], device=self._device)]
        if tensor.numel():
            messages.append(tensor.clone().view(-1))
        self._sent.append([(self._start(self._group.send, message), message) for message in messages])

    def await_input(self) -> None:
        """Receive the next tensor's size."""
        work = self._start(self._group.recv, self._size)
        if self._device.type == "cuda":
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            self._finish(work)  # the stream waits, not the host
            ended.record()
            self._waits.append((started, ended))
        else:
            began = time.perf_counter()
            try:
                self._finish(work)
            finally:
                self._bubble_seconds += time.perf_counter() - began

    def recv(self, tensor: torch.Tensor) -> None:
        """Receive the tensor itself. Its size is compared on the CPU only: a GPU's host would have to wait for it."""
        if self._device.type == "cpu" and int(self._size) != num_bytes(tensor):
            raise CommunicationError(f"rank {self._peers.rank}: a peer's tensor has another size than this rank's")
        if tensor.numel():
            self._finish(self._start(self._group.recv, tensor.view(-1)))

    def close(self) -> None:
        """Free the connection."""
        self._group.abort()
        self._sent.clear()
        self._peers.close()

    def _start(self, call, tensor: torch.Tensor) -> dist.Work:
        try:
            return call([tensor], self._other, _TAG)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _finish(self, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> CommunicationError:
        return CommunicationError(f"rank {self._peers.rank}: {self._peers.who_is_lost()} ({error})")
