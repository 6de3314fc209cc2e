"""`ModelRunner`: one rank's model, KV cache and sequences. It executes the steps that the scheduler plans."""

from __future__ import annotations

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
    StepOutput,
    TokenLogprobs,
)
from ridgewalk.kernels.build import load_library
from ridgewalk.kernels.kernel_set import KernelSet
from ridgewalk.kernels.select import select_kernels
from ridgewalk.model.batch import StepTensors, build_step
from ridgewalk.model.decoder import Decoder, LayerCache, rank_heads
from ridgewalk.model.loader import load_parameters
from ridgewalk.model.penalties import TokenCounts, needs_counts
from ridgewalk.model.phase_clock import PhaseClock
from ridgewalk.model.runner_config import RunnerConfig
from ridgewalk.model.sampler import SampleRow, is_plain_greedy, sample
from ridgewalk.model.sequence_table import SequenceTable
from ridgewalk.model.sharding import shard_plan
from ridgewalk.parallel.process_groups import ProcessGroups, make_process_groups
from ridgewalk.placement.model_spec import ModelSpec, validate_mesh

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
        torch.cuda.set_device(device)
    library = load_library() if device.type == "cpu" else None
    groups = make_process_groups(config.mesh, config.rank, config.init_method, device, library, config.timeout_s)
    num_threads = config.num_threads or torch.get_num_threads()
    dtype, heads = getattr(torch, config.dtype), rank_heads(spec, config.tp)
    kernels = select_kernels(device, library, num_threads, heads, dtype, config.block_size)
    torch.set_num_threads(num_threads if kernels.needs_torch_threads(dtype) else 1)
    return ModelRunner(config, spec, groups, kernels)


def device_memory(device: str) -> tuple[int, int]:
    """``(total, free)`` bytes of a CUDA device."""
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return total, free


class ModelRunner:
    """One rank. Call `load`, then `allocate`, then `execute` for each step, always from the same thread."""

    def __init__(self, config: RunnerConfig, spec: ModelSpec, groups: ProcessGroups, kernels: KernelSet) -> None:
        self.config = config
        self.spec = spec
        self._groups = groups
        self._kernels = kernels
        self._device = torch.device(config.device)
        self._dtype = getattr(torch, config.dtype)
        self._dp_rank, _, self._tp_rank = config.mesh.coordinates(config.rank)
        self._clock = PhaseClock(groups.tp, self._device)
        self._timings: RankTimings | None = None
        self._decoder: Decoder | None = None
        self._caches: list[LayerCache] = []
        self._table = SequenceTable(config.max_num_seqs, config.max_model_len, config.block_size)
        self._counts: dict[int, TokenCounts] = {}  # by row, of the sequences with penalties

    @property
    def kernels_name(self) -> str:
        """Name of the kernels in use, for logs."""
        return self._kernels.name

    @torch.inference_mode()
    def load(self, folder: str | Path | None = None, progress: Callable[[int, int], None] | None = None) -> None:
        """Read this rank's weights from ``folder`` (by default the configured model's).

        Raises:
            CheckpointError: the checkpoint does not match the config.
        """
        plan = shard_plan(self.spec, self.config.tp, self._tp_rank)
        parameters = load_parameters(folder or self.config.model, plan, self._dtype, self._device, progress)
        self._decoder = Decoder(
            self.spec, parameters, self._kernels, self._groups.tp, self.config.max_model_len, self._clock
        )

    @torch.inference_mode()
    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache; block ids are ``0 <= id < num_blocks``. A former cache is lost."""
        self._caches = []
        kv_heads = self.spec.num_kv_heads_per_rank(self.config.tp)
        shape = (num_blocks, self.config.block_size, kv_heads, self.spec.head_dim)
        for _ in range(self.spec.num_layers):
            key, value = (torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(2))
            self._caches.append(LayerCache(key, value))

    def warm_up(self) -> None:
        """Run a prefill and a decode step so that kernels are compiled and memory is touched before requests come.

        Collective: every rank calls it, before the first step, with the KV cache allocated. Leaves no sequence behind.
        """
        if not self._caches:
            raise RuntimeError("allocate() comes before warm_up()")
        num_blocks, block_size = self._caches[0].key.shape[:2]
        longest = min(self.config.max_model_len, num_blocks * block_size) - 1
        length = min(WARM_UP_TOKENS, self.config.max_num_batched_tokens, longest)
        blocks = list(range(-(-(length + 1) // block_size)))
        new = NewSequence(-1, [0] * length, length, SamplingParams(max_tokens=2, temperature=0.0))
        prefill = GroupBatch([-1], [0], [length], [blocks], [NO_TOKEN], [True], [new], [])
        decode = GroupBatch([-1], [length], [1], [[]], [0], [True], [], [])
        for batch in (prefill, decode, GroupBatch([], [], [], [], [], [], [], [-1])):
            self.execute(StepInput(-1, [batch] * self.config.dp))

    @torch.inference_mode()
    def execute(self, step: StepInput) -> StepOutput | None:
        """Compute one step and sample.

        Returns:
            The sampled tokens, on the first tensor-parallel rank; None on the others.

        Raises:
            StepError: the step contradicts what this rank knows of its sequences.
            CommunicationError: a peer is gone.
        """
        self._timings = None
        if step.measure:
            self._groups.tp.start_timing()
            self._clock.start()
        batch = step.groups[self._dp_rank]
        rows, dropped, created = self._table.apply(batch)
        for row in dropped:
            self._counts.pop(row, None)
        if self._tp_rank == 0:
            for row in created:
                if needs_counts(self._table.sampling(row)):
                    self._counts[row] = TokenCounts(self.spec.vocab_size)
        output = GroupOutput([])
        if batch.seq_ids:
            tensors = build_step(self._table, rows, batch, self._device)
            self._clock.mark("prepare")
            output = self._compute(batch, rows, tensors)
        if step.measure:
            self._clock.mark("sample")
            self._finish_measuring(step.step_id)
        return StepOutput(step.step_id, [output]) if self._tp_rank == 0 else None

    def timings(self) -> RankTimings | None:
        """What the last step took, when it was measured."""
        return self._timings

    def close(self) -> None:
        """Leave the process groups."""
        self._groups.close()

    def _compute(self, batch: GroupBatch, rows: np.ndarray, tensors: StepTensors) -> GroupOutput:
        assert self._decoder is not None, "load() comes before execute()"
        logits = self._decoder.forward(tensors, self._caches)
        if tensors.num_sampled == 0:
            return GroupOutput([NO_TOKEN] * len(rows))
        samples = np.asarray(batch.samples, dtype=bool)
        sampled_rows = rows[samples]
        tokens, logprobs = self._choose(logits, sampled_rows)
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

    def _choose(
        self, logits: torch.Tensor, rows: np.ndarray
    ) -> tuple[torch.Tensor | None, list[TokenLogprobs | None] | None]:
        """Tokens on tensor-parallel rank 0; None on the others. ``logits`` is this rank's shard of the vocabulary."""
        tp, table = self._groups.tp, self._table
        params = [table.sampling(row) for row in rows]
        if all(is_plain_greedy(p) for p in params):
            if tp.size == 1:
                return self._kernels.arg_max(logits)[1], None
            return self._gather_arg_max(logits), None
        if tp.size > 1:
            gathered = tp.gather(logits)
            if gathered is None:
                return None, None
            logits = gathered.transpose(0, 1).flatten(1)
        details = []
        for row, sampling in zip(rows.tolist(), params, strict=True):
            position, num_prompt = int(table.num_tokens[row]), int(table.num_prompt_tokens[row])
            counts = self._counts.get(row)
            if counts is not None:
                counts.update(table.token_ids[row, :position], num_prompt)
            details.append(SampleRow(sampling, position, position - num_prompt, counts))
        return sample(logits[:, : self.spec.vocab_size], details, self._kernels)

    def _gather_arg_max(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Arg max over the shards: two numbers a row travel instead of a row of logits."""
        assert self._decoder is not None
        values, indices = self._kernels.arg_max(logits)
        pairs = torch.stack((values.double(), (indices + self._decoder.vocab_start).double()))
        gathered = self._groups.tp.gather(pairs)
        if gathered is None:
            return None
        best = gathered[:, 0].argmax(dim=0, keepdim=True)  # of equals the first rank: the lowest token id
        return gathered[:, 1].gather(0, best).squeeze(0).long()

    def _finish_measuring(self, step_id: int) -> None:
        collectives = [CollectiveTiming(*timed) for timed in self._groups.tp.stop_timing()]
        seconds = self._clock.stop()
        self._timings = RankTimings(step_id, self.config.rank, seconds, dict(self._clock.phases), collectives)


def _spread(logprobs: list[TokenLogprobs | None] | None, samples: np.ndarray) -> list[TokenLogprobs | None] | None:
    """From one entry a sampled row to one entry a row."""
    if logprobs is None:
        return None
    spread: list[TokenLogprobs | None] = [None] * len(samples)
    for row, entry in zip(np.flatnonzero(samples).tolist(), logprobs, strict=True):
        spread[row] = entry
    return spread
