"""Which experts the tokens of a running replica choose: summed up, and written for the next one to be balanced by."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from ridgewalk.engine.step import RankTimings
from ridgewalk.placement.expert_load import ExpertLoad, ExpertLoadError, read_recorded, write_expert_load
from ridgewalk.placement.expert_map import ExpertMap, uniform_expert_map
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.placement.moe_spec import MoESpec
from ridgewalk.placement.stages import stage_layers
from ridgewalk.replica.engine_config import EngineConfig

logger = logging.getLogger(__name__)

WRITE_EVERY_S = 2.0
"""What a replica loses of its loads when it is killed."""


class ExpertLoadCounter:
    """Sums what ranks report of their slots into tokens per logical expert. Of measured steps: a sample is enough."""

    def __init__(self, spec: ModelSpec, moe: MoESpec, mesh: Mesh, expert_map: ExpertMap | None) -> None:
        self.moe = moe
        self._mesh = mesh
        self._map = expert_map or uniform_expert_map(moe, mesh.dp * mesh.tp)
        stages = stage_layers(spec, mesh.pp)
        self._stages = [
            [index for index, layer in enumerate(moe.sparse_layers) if layer in layers] for layers in stages
        ]
        self.layers = [[0] * moe.num_experts for _ in moe.sparse_layers]  # tokens, [sparse layer][expert]

    def add(self, ranks: Sequence[RankTimings]) -> None:
        """Take in a measured step."""
        for timings in ranks:
            dp, stage, tp = self._mesh.coordinates(timings.rank)
            if timings.expert_tokens:
                self._add_rank(dp * self._mesh.tp + tp, self._stages[stage], timings.expert_tokens)

    def _add_rank(self, ep_rank: int, layers: Sequence[int], expert_tokens: Sequence[Sequence[int]]) -> None:
        for layer, tokens_of_slots in zip(layers, expert_tokens, strict=True):
            for expert, tokens in zip(self._map.layers[layer][ep_rank], tokens_of_slots, strict=True):
                self.layers[layer][expert] += tokens


class ExpertLoadRecorder:
    """Adds the loads to a file: every `WRITE_EVERY_S`, and at the end.

    What the file holds stays: a replica that is started again, or a later service, goes on where the one before ended.
    To begin anew, remove the file. Where it cannot be written, or is of another model or shape, it is left alone with
    one warning, and what was not written is kept for the next try. A thread of its own writes, so that a slow disk does
    not hold up the engine's steps.
    """

    def __init__(self, model_name: str, counter: ExpertLoadCounter, path: Path) -> None:
        self._model_name = model_name
        self._counter = counter
        self._path = path
        self._lock = threading.Lock()  # of the counter
        self._written = [list(tokens) for tokens in counter.layers]  # of the counter's, what the file has
        self._failing = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expert-load", daemon=True)
        self._thread.start()

    def on_timings(self, ranks: Sequence[RankTimings]) -> None:
        """A measured step, one entry per rank."""
        with self._lock:
            self._counter.add(ranks)

    def close(self) -> None:
        """Write what is not written yet. Idempotent."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(WRITE_EVERY_S):
            self._write()
        self._write()

    def _write(self) -> None:
        with self._lock:
            counted = [list(tokens) for tokens in self._counter.layers]
        if counted == self._written:
            return
        try:
            self._add_to_file(_sum(counted, self._written, sign=-1))
        except OSError as error:
            self._warn(f"record_expert_load: {self._path} cannot be written: {error.strerror}")
        except ExpertLoadError as error:
            self._warn(str(error))
        else:
            self._written, self._failing = counted, False

    def _add_to_file(self, layers: list[list[int]]) -> None:
        recorded = read_recorded(self._path, self._model_name, self._counter.moe)
        if recorded is not None:
            layers = _sum(recorded.layers, layers)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_expert_load(self._path, ExpertLoad(self._model_name, self._counter.moe.num_experts, layers))

    def _warn(self, message: str) -> None:
        if not self._failing:
            logger.warning("%s (no further warning until it succeeds)", message)
        self._failing = True


def _sum(first: list[list[int]], second: list[list[int]], sign: int = 1) -> list[list[int]]:
    return [[a + sign * b for a, b in zip(*layers, strict=True)] for layers in zip(first, second, strict=True)]


def make_expert_load_recorder(config: EngineConfig, spec: ModelSpec) -> ExpertLoadRecorder | None:
    """The recorder that the configuration asks for, if it does."""
    if config.record_expert_load is None or spec.moe is None or not config.expert_parallel:
        return None
    expert_map = ExpertMap.from_lists(config.expert_map) if config.expert_map is not None else None
    counter = ExpertLoadCounter(spec, spec.moe, config.mesh, expert_map)
    return ExpertLoadRecorder(config.model_name, counter, Path(config.record_expert_load))
