"""`ModelRunner`: one rank's model, KV cache and sequences. It executes the steps that the scheduler plans."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.step import (
    NO_TOKEN,
    CollectiveTiming,
    GroupBatch,
    GroupOutput,
    NewSequence,
    RankTimings,
    StepInput,
    TokenLogprobs,
)
from ridgewalk.kernels.block_scales import block_linear
from ridgewalk.kernels.build import load_library
from ridgewalk.kernels.cuda_fp8 import probe_fp8_linear
from ridgewalk.kernels.kernel_set import KernelSet
from ridgewalk.kernels.select import select_kernels
from ridgewalk.model.attention import rank_heads
from ridgewalk.model.batch import build_step
from ridgewalk.model.decode_graphs import DecodeGraphs, can_capture
from ridgewalk.model.decoder import Decoder
from ridgewalk.model.host_cache import HostCache
from ridgewalk.model.kv_cache import LatentCache, LayerCache, make_cache
from ridgewalk.model.loader import load_parameters
from ridgewalk.model.mla import rank_latents
from ridgewalk.model.phase_clock import PhaseClock
from ridgewalk.model.runner_config import RunnerConfig
from ridgewalk.model.sequence_table import SequenceTable, StepError
from ridgewalk.model.sharded_sampler import ShardedSampler
from ridgewalk.model.sharding import shard_plan
from ridgewalk.parallel.process_groups import ProcessGroups, make_process_groups
from ridgewalk.placement.expert_map import ExpertMap, uniform_expert_map
from ridgewalk.placement.fp8_weights import kept_block
from ridgewalk.placement.model_spec import ModelSpec, validate_mesh
from ridgewalk.placement.stages import stage_layers

WARM_UP_TOKENS = 512
"""Longest prefill of a warm-up: longer ones meet nothing new."""


def create_runner(config: RunnerConfig) -> ModelRunner:
    """Connect with the peers and make a runner, without weights or KV cache yet. Blocks until every rank does the same.

    Sets torch's thread count for the process.

    Raises:
        UnsupportedModelError: the model, or the model on this mesh, is not supported.
        ValueError: ``init_method`` is malformed.
    """
    spec = ModelSpec.from_folder(config.model)
    validate_mesh(spec, config.mesh)
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # it takes no device without a number
    library = load_library() if device.type == "cpu" else None
    groups = make_process_groups(config.mesh, config.rank, config.init_method, device, library, config.timeout_s)
    num_threads = config.num_threads or torch.get_num_threads()
    dtype = getattr(torch, config.dtype)
    heads = rank_heads(spec, config.tp) if spec.mla is None else rank_latents(spec, config.tp)
    fp8_block = kept_block(spec, config.keeps_fp8)
    kernels = select_kernels(device, library, num_threads, heads, dtype, config.block_size, fp8_block)
    torch.set_num_threads(num_threads if kernels.needs_torch_threads(dtype) else 1)
    return ModelRunner(config, spec, groups, kernels)


def device_memory(device: str) -> tuple[int, int]:
    """``(total, free)`` bytes of a CUDA device."""
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return total, free


def multiplies_fp8(device: str, spec: ModelSpec, dtype: str) -> bool:
    """Whether a device has a product that works for a checkpoint's FP8 weights, found by trying it.

    Without one they are dequantized on the way in: once, and not in every step.
    """
    found = torch.device(device)
    if found.type != "cuda" or spec.fp8_block is None:
        return False
    return probe_fp8_linear(spec.fp8_block, getattr(torch, dtype), found) is not block_linear


class ModelRunner:
    """One rank. Call `load`, then `allocate`, then `execute` for each step, always from the same thread."""

    def __init__(self, config: RunnerConfig, spec: ModelSpec, groups: ProcessGroups, kernels: KernelSet) -> None:
        self.config = config
        self.spec = spec
        self._groups = groups
        self._kernels = kernels
        self._device = torch.device(config.device)
        self._dtype = getattr(torch, config.dtype)
        self._group, self._stage, _ = config.mesh.coordinates(config.rank)
        self._decoder: Decoder | None = None
        self._num_blocks = 0
        self._caches: list[LayerCache | LatentCache] = []
        self._graphs: DecodeGraphs | None = None
        self._host_cache: HostCache | None = None
        self._table = SequenceTable(config.max_num_seqs, config.max_model_len, config.block_size)
        last = groups.next is None
        self._sampler = ShardedSampler(spec, kernels, groups.tp, self._table) if last else None
        self._clock = PhaseClock(groups, self._device)
        self._timings: RankTimings | None = None
        self._ended = 0.0  # when the last step did
        self._idle_seconds = 0.0  # of the first stage, see `_await_step`
        self._reported = (0.0, 0, 0)  # bubble seconds, routed tokens and bytes, as of the last report

    @property
    def kernels_name(self) -> str:
        """Name of the kernels in use, for logs."""
        return self._kernels.name

    @property
    def num_captured(self) -> int:
        """How many sizes of decode steps run as CUDA graphs."""
        return 0 if self._graphs is None else len(self._graphs)

    @property
    def cache_bytes(self) -> int:
        """Memory of the KV cache."""
        return sum(cache.num_bytes for cache in self._caches)

    @torch.inference_mode()
    def load(self, folder: str | Path | None = None, progress: Callable[[int, int], None] | None = None) -> None:
        """Read this rank's weights from ``folder`` (by default the configured model's).

        Raises:
            CheckpointError: the checkpoint does not match the config.
        """
        config, expert_map = self.config, _expert_map(self.spec, self.config)
        plan = shard_plan(self.spec, config.mesh, config.rank, expert_map, config.keeps_fp8)
        parameters = load_parameters(folder or config.model, self.spec, plan, self._dtype, self._device, progress)
        self._decoder = Decoder(self.spec, config, parameters, self._kernels, self._groups, expert_map, self._clock)

    @torch.inference_mode()
    def allocate(self, num_blocks: int, num_swap_blocks: int = 0) -> None:
        """Make the stage's KV cache; block ids are ``0 <= id < num_blocks``. A former cache is lost.

        ``num_swap_blocks``: on the host, beside it.
        """
        self._caches, self._host_cache, self._graphs = [], None, None
        self._num_blocks = num_blocks
        for _ in stage_layers(self.spec, self.config.pp)[self._stage]:
            self._caches.append(
                make_cache(self.spec, self.config.tp, num_blocks, self.config.block_size, self._dtype, self._device)
            )
        if num_swap_blocks:
            self._host_cache = HostCache(self._caches, num_swap_blocks)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run a prefill and a decode step so that kernels are compiled and memory is touched before requests come.

        On CUDA decode steps are captured as well, where they can be. Collective: every rank calls it, before the first
        step, with the KV cache allocated. Leaves no sequence behind.

        Raises:
            ValueError: the KV cache leaves no room for what captured steps keep.
        """
        if not self._caches:
            raise RuntimeError("allocate() comes before warm_up()")
        longest = min(self.config.max_model_len, self._num_blocks * self.config.block_size) - 1
        length = min(WARM_UP_TOKENS, self.config.max_num_batched_tokens, longest)
        blocks = list(range(-(-(length + 1) // self.config.block_size)))
        new = NewSequence(-1, [0] * length, length, SamplingParams(max_tokens=2, temperature=0.0))
        prefill = GroupBatch([-1], [0], [length], [blocks], [NO_TOKEN], [True], [new], [])
        decode = GroupBatch([-1], [length], [1], [[]], [0], [True], [], [])
        for batch in (prefill, decode, GroupBatch([], [], [], [], [], [], [], [-1])):
            self.execute(StepInput(-1, [batch] * self.config.dp))
        if self._sampler is not None:
            self._sampler.warm_up(self._dtype, self._device)
        self._capture()
        self._idle_seconds = 0.0
        self._reported = self._totals()

    @torch.inference_mode()
    def execute(self, step: StepInput) -> GroupOutput | None:
        """Compute this rank's part of one step.

        Returns:
            What the attention group sampled, on its first rank of the last stage; None on the others.

        Raises:
            StepError: the step contradicts what this rank knows of its sequences.
            CommunicationError: a peer is gone.
        """
        self._await_step(step)
        self._timings = None
        if step.measure:
            self._groups.start_timing()
            self._clock.start()
        batch = step.groups[self._group]
        if batch.copies:
            if self._host_cache is None:
                raise StepError("a step moves KV to or from the host, and this rank was given no swap space")
            self._host_cache.copy(batch.copies)
        rows, dropped, created = self._table.apply(batch)
        if self._sampler is not None:
            self._sampler.follow(dropped, created)
        output = self._compute(batch, rows, step.measure)
        if step.measure:
            self._clock.mark("sample")
            self._timings = self._report(step.step_id)
        self._ended = time.perf_counter()
        return output if self._sampler is not None and self._groups.tp.rank == 0 else None

    def timings(self) -> RankTimings | None:
        """What the last step took, when it was measured."""
        return self._timings

    def close(self) -> None:
        """End the kernels' threads and leave the process groups.

        Not left to the collector: a signal that comes while it ends threads would be reported as an ignored exception.
        """
        self._kernels.close()
        self._groups.close()

    def _capture(self) -> None:
        if not can_capture(self.spec, self.config, self._kernels):
            return
        assert self._decoder is not None
        self._graphs = DecodeGraphs(self._decoder, self._caches, self.config, self._device)
        try:
            self._graphs.capture()
        except torch.OutOfMemoryError:
            raise ValueError(
                "the KV cache leaves no memory for decode steps as CUDA graphs; lower --memory (or --num-blocks)"
            ) from None

    def _compute(self, batch: GroupBatch, rows: np.ndarray, measure: bool) -> GroupOutput:
        assert self._decoder is not None, "load() comes before execute()"
        tensors = build_step(self._table, rows, batch, self._device) if batch.seq_ids else None
        self._clock.mark("prepare")
        # A measured step looks between the layers, which a graph does not let it.
        if self._graphs is not None and tensors is not None and not measure and self._graphs.takes(tensors):
            logits: torch.Tensor | None = self._graphs.run(tensors)
        else:
            logits = self._decoder.forward(tensors, self._caches)
        if logits is None or self._sampler is None:
            return GroupOutput([NO_TOKEN] * len(rows))
        samples = np.asarray(batch.samples, dtype=bool)
        sampled_rows = rows[samples]
        tokens, logprobs = self._sampler.choose(logits, sampled_rows)
        if self.config.tokens_broadcast:
            if tokens is None:
                tokens = torch.empty(len(sampled_rows), dtype=torch.int64, device=self._device)
            tokens = self._groups.tp.broadcast(tokens.contiguous())
        if tokens is None:
            return GroupOutput([])
        chosen = np.full(len(rows), NO_TOKEN, dtype=np.int64)
        chosen[samples] = tokens.cpu().numpy()
        self._table.sampled[sampled_rows] = chosen[samples]
        return GroupOutput(chosen.tolist(), _spread(logprobs, samples))

    def _await_step(self, step: StepInput) -> None:
        """Account for the time without a step.

        While others were open it is bubble too: the pipeline had work, but this end of it had none. Later stages see
        theirs in `StageLink.bubble_seconds`. A GPU may still have been busy, so that its time here means nothing.
        """
        first = self._groups.previous is None and self._groups.next is not None
        if first and step.others_in_flight and self._device.type == "cpu":
            self._idle_seconds += time.perf_counter() - self._ended

    def _report(self, step_id: int) -> RankTimings:
        assert self._decoder is not None
        collectives = [CollectiveTiming(*timed) for timed in self._groups.stop_timing()]
        seconds = self._clock.stop()
        before, self._reported = self._reported, self._totals()
        bubble, routed_tokens, routed_bytes = (now - then for now, then in zip(self._reported, before, strict=True))
        return RankTimings(
            step_id,
            self.config.rank,
            seconds,
            dict(self._clock.phases),
            collectives,
            bubble,
            [list(layer.expert_tokens) for layer in self._decoder.sparse_layers],
            int(routed_tokens),
            int(routed_bytes),
        )

    def _totals(self) -> tuple[float, int, int]:
        """Bubble seconds, routed tokens and routed bytes since the start."""
        assert self._decoder is not None
        sparse, previous = self._decoder.sparse_layers, self._groups.previous
        bubble = self._idle_seconds + (previous.bubble_seconds if previous is not None else 0.0)
        return bubble, sum(layer.routed_tokens for layer in sparse), sum(layer.routed_bytes for layer in sparse)


def _expert_map(spec: ModelSpec, config: RunnerConfig) -> ExpertMap | None:
    """Which experts each expert-parallel rank holds; without expert parallelism every rank holds all, in part."""
    if spec.moe is None:
        return None
    if not config.expert_parallel:
        return uniform_expert_map(spec.moe, 1)
    if config.expert_map is not None:
        return ExpertMap.from_lists(config.expert_map)
    return uniform_expert_map(spec.moe, config.dp * config.tp)


def _spread(logprobs: list[TokenLogprobs | None] | None, samples: np.ndarray) -> list[TokenLogprobs | None] | None:
    """From one entry a sampled row to one entry a row."""
    if logprobs is None:
        return None
    spread: list[TokenLogprobs | None] = [None] * len(samples)
    for row, entry in zip(np.flatnonzero(samples).tolist(), logprobs, strict=True):
        spread[row] = entry
    return spread
