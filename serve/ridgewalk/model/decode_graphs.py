"""Decode steps as CUDA graphs: a step's hundreds of kernels are launched at once instead of one by one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ridgewalk.kernels.kernel_set import KernelSet
from ridgewalk.model.batch import StepTensors
from ridgewalk.model.decoder import Decoder
from ridgewalk.model.kv_cache import LatentCache, LayerCache
from ridgewalk.model.runner_config import RunnerConfig
from ridgewalk.placement.model_spec import ModelSpec

logger = logging.getLogger(__name__)

FIRST_CONTEXT = 1024
"""Tokens that the shortest graphs have room for; each next kind has room for four times more."""

MOST_SEQUENCES = 512
"""Of a captured step; larger ones keep the device busy for longer than launching takes."""


def can_capture(spec: ModelSpec, config: RunnerConfig, kernels: KernelSet) -> bool:
    """Whether steps of a rank can be captured: nothing in them waits for the host or for another rank.

    So not with expert parallelism, whose ranks tell each other how much they send; and not with several ranks at all,
    which has not been tried. The cache of latents has no kernel that takes padding.
    """
    return config.mesh.world_size == 1 and kernels.takes_padding and spec.mla is None


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: StepTensors
    logits: torch.Tensor


class DecodeGraphs:
    """Captured decode steps of one rank, by number of sequences and longest context.

    A graph is captured when a step first needs it, which takes as long as a few steps. A smaller step fills the rest of
    its rows with padding: no slot to write to and no keys to read.
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
        self._block_size = config.block_size
        self._max_model_len = config.max_model_len
        self._max_num_seqs = min(config.max_num_seqs, MOST_SEQUENCES)
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool: tuple[int, int] | None = None
        self._captures = True

    def takes(self, step: StepTensors) -> bool:
        """Whether a step is one of those that are captured."""
        return (
            self._captures
            and step.max_seqlen_q == 1
            and step.sampled_tokens is None
            and step.num_sampled == len(step.token_ids) <= self._max_num_seqs
        )

    def run(self, step: StepTensors) -> torch.Tensor | None:
        """Logits of a step that `takes` took: ``[num_sampled, vocab]``, overwritten by the next run.

        A step that cannot be captured (experts in FP8 or FP32 wait for the host, or memory is short) is computed as
        any other, and no further one is captured.
        """
        count = len(step.token_ids)
        key = padded_batch(count), padded_context(step.max_seqlen_k, self._max_model_len)
        captured = self._captured.get(key)
        if captured is None:
            try:
                captured = self._captured[key] = self._capture(*key)
            except RuntimeError as error:
                logger.info("decode steps are not captured any more: %s", str(error).splitlines()[0])
                self._captures = False
                return self._decoder.forward(step, self._caches)
        _fill(captured.inputs, step)
        captured.graph.replay()
        return captured.logits[:count]

    def _capture(self, batch: int, context: int) -> _Captured:
        inputs = self._padding(batch, context)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # what is set up at a first call must not be captured
            self._decoder.forward(inputs, self._caches)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._decoder.forward(inputs, self._caches)
        assert logits is not None
        self._pool = graph.pool()
        return _Captured(graph, inputs, logits)

    def _padding(self, batch: int, context: int) -> StepTensors:
        def full(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=self._device)

        return StepTensors(
            token_ids=full(0, batch),
            positions=full(0, batch),
            slot_mapping=full(-1, batch),
            cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=self._device),
            seqused_k=full(0, batch, dtype=torch.int32),
            block_table=full(0, batch, -(-context // self._block_size), dtype=torch.int32),
            max_seqlen_q=1,
            max_seqlen_k=context,
            sampled_tokens=None,
            num_sampled=batch,
        )


def padded_batch(count: int) -> int:
    """Sequences of the graph for ``count``: powers of two up to 8, then a quarter more at most, and whole eights."""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = max(8, 1 << ((count - 1).bit_length() - 3))
    return -(-count // step) * step


def padded_context(length: int, max_model_len: int) -> int:
    """Tokens that the graph for a longest context of ``length`` has room for."""
    context = FIRST_CONTEXT
    while context < length:
        context *= 4
    return min(context, max_model_len)


def _fill(inputs: StepTensors, step: StepTensors) -> None:
    count = len(step.token_ids)
    inputs.token_ids[:count].copy_(step.token_ids)
    inputs.positions[:count].copy_(step.positions)
    inputs.slot_mapping[:count].copy_(step.slot_mapping)
    inputs.seqused_k[:count].copy_(step.seqused_k)
    inputs.block_table[:count, : step.block_table.shape[1]].copy_(step.block_table)
    if count < len(inputs.token_ids):
        inputs.slot_mapping[count:].fill_(-1)
        inputs.seqused_k[count:].fill_(0)
