"""`EngineReplica`: the Serve deployment around one engine. Torch-free; its ranks are actors of their own."""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec
import ray
from ray import serve
from ray.util import get_current_placement_group

from ridgewalk.logs import configure_logging
from ridgewalk.metrics.engine_metrics import EngineMetrics
from ridgewalk.metrics.utilization import HardwarePeaks
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig, describe_expert_balance, describe_mesh
from ridgewalk.replica.engine_loop import EngineLoop
from ridgewalk.replica.expert_load_recorder import make_expert_load_recorder
from ridgewalk.replica.protocol import ChannelAddress, GenerateCall, GenerateReply, Introduction, ReplyStatus
from ridgewalk.replica.ray_ranks import RayRanks
from ridgewalk.replica.serve_rank import serve_rank
from ridgewalk.replica.zmq_executor import LoadProgress, ZmqExecutor

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 2.0


class EngineReplica:
    """One replica of one placement. Every method takes the id of the replica that the caller meant."""

    def __init__(self, config: EngineConfig) -> None:
        configure_logging()
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._config = config
        self._progress_logged: float | None = None
        address = ray.util.get_node_ip_address()
        spec = ModelSpec.from_folder(config.model_path)
        executor = ZmqExecutor(config, spec, RayRanks(get_current_placement_group()), address, self._log_progress)
        plan = executor.memory_plan
        logger.info(
            "%s %s: %s; %d KV blocks of %d tokens (%s) per attention group, %.0f MiB of weights per rank%s",
            config.model_name, config.placement, describe_mesh(config), plan.num_blocks, plan.block_size,
            plan.describe_room(), plan.weight_bytes / 2**20, describe_expert_balance(config),
        )  # fmt: skip
        peaks = HardwarePeaks(config.peak_flops_per_rank, config.peak_bandwidth_per_rank)
        self._metrics = EngineMetrics(
            config, serve_rank(), spec, peaks, keeps_fp8=plan.keeps_fp8, current_rank=serve_rank
        )
        self._loop = EngineLoop(
            config.scheduler_config(plan),
            executor,
            self._metrics,
            address,
            config.max_waiting,
            executor.socket,
            # The loads of the others are alike, and the file is one.
            make_expert_load_recorder(config, spec) if context.rank.rank == 0 else None,
        )
        self._loop.start()

    async def generate(self, call: bytes, replica_id: str) -> bytes:
        """One `GenerateCall`, open until its last sequence ends; returns a `GenerateReply`."""
        if replica_id != self._id:
            return msgspec.msgpack.encode(GenerateReply(ReplyStatus.MOVED))
        decoded = msgspec.msgpack.decode(call, type=GenerateCall)
        event_loop = asyncio.get_running_loop()
        reply: asyncio.Future[GenerateReply] = event_loop.create_future()
        self._loop.submit(decoded, lambda value: event_loop.call_soon_threadsafe(_set, reply, value))
        try:
            return msgspec.msgpack.encode(await reply)
        except asyncio.CancelledError:
            self._loop.cancel(decoded.request_id)
            raise

    async def introduce(self, introduction: bytes, replica_id: str) -> bytes | None:
        """An ingress will attach to the channel; returns a `ChannelAddress`, or None if another replica was meant."""
        if replica_id != self._id or self._loop.failure is not None:
            return None
        self._loop.introduce(msgspec.msgpack.decode(introduction, type=Introduction))
        config = self._config
        return msgspec.msgpack.encode(
            ChannelAddress(
                self._loop.endpoint,
                self._loop.epoch,
                config.block_size,
                config.world_size,
                config.enable_prefix_caching,
            )
        )

    async def metrics(self, replica_id: str) -> bytes | None:
        """This replica's `ReplicaMetrics`, or None if another replica was meant; attached ingresses ask the channel."""
        if replica_id != self._id:
            return None
        return msgspec.msgpack.encode(self._loop.metrics())

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        problem = self._loop.problem()
        if problem is not None:
            raise RuntimeError(problem)

    def __del__(self) -> None:
        if hasattr(self, "_loop"):
            self._loop.stop()

    def _log_progress(self, progress: LoadProgress) -> None:
        if self._progress_logged is None:  # the time counts from here: a small model needs no such line
            self._progress_logged = time.monotonic()
        if time.monotonic() - self._progress_logged < PROGRESS_EVERY_S:
            return
        self._progress_logged = time.monotonic()
        logger.info(
            "%s %s: %d of %d MiB of weights read",
            self._config.model_name, self._config.placement, progress.done_bytes >> 20, progress.total_bytes >> 20,
        )  # fmt: skip


def _set(future: asyncio.Future[GenerateReply], value: GenerateReply) -> None:
    if not future.done():  # the caller may have gone meanwhile
        future.set_result(value)
