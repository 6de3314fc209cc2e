"""Rank processes as Ray actors in the replica's placement group."""

from __future__ import annotations

import os

import msgspec
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ridgewalk.replica.rank_process import run_rank
from ridgewalk.replica.rank_protocol import RankLaunch


class RankActor:
    """One rank. `run` ends only with the rank, so that its result reports the rank's death."""

    def run(self, launch: bytes) -> None:
        """Serve the rank described by a msgpack `RankLaunch`."""
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        run_rank(msgspec.msgpack.decode(launch, type=RankLaunch))


class RayRanks:
    """Implements `zmq_executor.RankLauncher`. Bundle 0 is the replica's own, then one per stage and tp group."""

    def __init__(self, group: PlacementGroup | None) -> None:
        self._group = group
        self._actors: list[ray.actor.ActorHandle] = []
        self._runs: list[ray.ObjectRef] = []

    def start(self, launches: list[RankLaunch]) -> None:
        for launch in launches:
            engine = launch.engine
            options: dict[str, object] = {
                "num_cpus": engine.cpus_per_rank,
                "num_gpus": engine.gpus_per_rank,
                "max_restarts": 0,
            }
            if self._group is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=1 + launch.rank // engine.tp
                )
            actor = ray.remote(RankActor).options(**options).remote()
            self._actors.append(actor)
            self._runs.append(actor.run.remote(msgspec.msgpack.encode(launch)))

    def ended(self) -> tuple[int, str] | None:
        ready, _ = ray.wait(self._runs, timeout=0, fetch_local=False)
        if not ready:
            return None
        try:
            ray.get(ready[0])
            reason = "it returned"
        except ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0]
        return self._runs.index(ready[0]), reason

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._runs = [], []
