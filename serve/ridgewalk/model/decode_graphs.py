"""Decode steps as CUDA graphs: a step's hundreds of kernels are launched at once instead of one by one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ridgewalk.kernels.kernel_set import KernelSet
from ridgewalk.model.batch import StepTensors
from ridgewalk.model.decoder import Decoder
from ridgewalk.model.kv_cache import LatentCache, LayerCache
from ridgewalk.model.runner_config import RunnerConfig
from ridgewalk.placement.model_spec import ModelSpec

logger = logging.getLogger(__name__)

MOST_SEQUENCES = 512
"""Of a captured step; larger ones keep the device busy for longer than launching takes."""


def can_capture(spec: ModelSpec, config: RunnerConfig, kernels: KernelSet) -> bool:
    """Whether steps of a rank may be captured.

    Not those of several ranks: with expert parallelism they tell each other how much they send, and others have not
    been tried. The cache of latents has no kernel that takes padding.
    """
    return config.mesh.world_size == 1 and kernels.takes_padding and spec.mla is None


@dataclass(frozen=True)
class _Captured:
    """A graph and what it reads; its logits are in the buffer that all share."""

    graph: torch.cuda.CUDAGraph
    inputs: StepTensors


class DecodeGraphs:
    """Captured decode steps of one rank, by number of sequences.

    A smaller step fills the rest of its rows with padding: no slot to write to and no keys to read. Inputs and logits
    are parts of buffers that all graphs share, and so is the memory in between, for one graph runs at a time. What they
    keep, some hundred MiB, is in what the KV cache leaves of the device.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[LayerCache | LatentCache],
        config: RunnerConfig,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._caches = caches
        self._device = device
        self._most = padded_batch(min(config.max_num_seqs, MOST_SEQUENCES))
        self._inputs = _padding(self._most, config.max_model_len, config.block_size, device)
        self._logits: torch.Tensor | None = None
        self._captured: dict[int, _Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def capture(self) -> None:
        """Capture steps of all sizes, the largest first, whose memory serves the others.

        Where a step waits for the host, as experts in FP8 do, none is captured.

        Raises:
            torch.OutOfMemoryError: the KV cache leaves no room.
        """
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            # A capture that fails leaves the allocator and the stream in a state of their own, so it is known before.
            if reason := self._what_waits():
                logger.info("decode steps are not captured: %s", reason)
                return
            pool = torch.cuda.graph_pool_handle()
            for batch in sorted({padded_batch(count) for count in range(1, self._most + 1)}, reverse=True):
                inputs = _first_rows(self._inputs, batch)
                self._forward(inputs)  # what is set up at a first call must not be captured
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    self._forward(inputs)
                self._captured[batch] = _Captured(graph, inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def takes(self, step: StepTensors) -> bool:
        """Whether a step is one of those that are captured."""
        return (
            step.max_seqlen_q == 1
            and step.sampled_tokens is None
            and step.num_sampled == len(step.token_ids)
            and padded_batch(step.num_sampled) in self._captured
        )

    def run(self, step: StepTensors) -> torch.Tensor:
        """Logits of a step that `takes` took: ``[num_sampled, vocab]``, overwritten by the next run."""
        assert self._logits is not None
        captured = self._captured[padded_batch(step.num_sampled)]
        _fill(captured.inputs, step)
        captured.graph.replay()
        return self._logits[: step.num_sampled]

    def _forward(self, inputs: StepTensors) -> None:
        logits = self._decoder.forward(inputs, self._caches)
        assert logits is not None
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits[: len(logits)].copy_(logits)

    def _what_waits(self) -> str:
        """What in a step waits for the device, if anything does."""
        self._forward(self._inputs)
        try:
            with _waiting_is_an_error():
                self._forward(self._inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return (str(error) or type(error).__name__).splitlines()[0]
        return ""


def padded_batch(count: int) -> int:
    """Sequences of the graph for ``count``: powers of two up to 8, then a quarter more at most, and whole eights."""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = max(8, 1 << ((count - 1).bit_length() - 3))
    return -(-count // step) * step


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _padding(batch: int, max_model_len: int, block_size: int, device: torch.device) -> StepTensors:
    def full(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    return StepTensors(
        token_ids=full(0, batch),
        positions=full(0, batch),
        slot_mapping=full(-1, batch),
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=device),
        seqused_k=full(0, batch, dtype=torch.int32),
        block_table=full(0, batch, -(-max_model_len // block_size), dtype=torch.int32),
        max_seqlen_q=1,
        max_seqlen_k=max_model_len,
        sampled_tokens=None,
        num_sampled=batch,
    )


def _first_rows(inputs: StepTensors, count: int) -> StepTensors:
    return replace(
        inputs,
        token_ids=inputs.token_ids[:count],
        positions=inputs.positions[:count],
        slot_mapping=inputs.slot_mapping[:count],
        cu_seqlens_q=inputs.cu_seqlens_q[: count + 1],
        seqused_k=inputs.seqused_k[:count],
        block_table=inputs.block_table[:count],
        num_sampled=count,
    )


def _fill(inputs: StepTensors, step: StepTensors) -> None:
    count = step.num_sampled
    inputs.token_ids[:count].copy_(step.token_ids)
    inputs.positions[:count].copy_(step.positions)
    inputs.slot_mapping[:count].copy_(step.slot_mapping)
    inputs.seqused_k[:count].copy_(step.seqused_k)
    inputs.block_table[:count, : step.block_table.shape[1]].copy_(step.block_table)
    if count < inputs.num_sampled:
        inputs.slot_mapping[count:].fill_(-1)
        inputs.seqused_k[count:].fill_(0)
