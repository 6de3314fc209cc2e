"""Messages between an executor and its ranks: msgpack over one ZeroMQ connection per rank.

A rank says `Hello`, is told to `Begin`, reports `Loading` and then `Ready`; from then on it gets one `Run` per step.
Any failure is a last word: `Failed`.
"""

from __future__ import annotations

import msgspec

from ridgewalk.engine.step import GroupOutput, RankTimings, StepInput
from ridgewalk.replica.engine_config import EngineConfig


class RankLaunch(msgspec.Struct, frozen=True):
    """What a rank process is started with."""

    engine: EngineConfig
    rank: int
    endpoint: str  # of the executor
    identity: bytes  # secret: the executor listens to nobody else


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Rank -> executor: the process runs on this host."""

    rank: int
    pid: int
    address: str  # of the host, for the other ranks
    free_port: int  # on that host; the first rank's is where the process group meets
    memory_bytes: int  # of the device (CUDA), or of the host or its container (CPU)
    host: str  # ranks with equal names share memory
    multiplies_fp8: bool  # the device has a product for the model's FP8 weights
    host_bytes: int  # memory of the host or its container


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Rank -> executor: bytes of weights read so far."""

    rank: int
    done_bytes: int
    total_bytes: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Rank -> executor: weights are loaded, the cache allocated, a step has been tried."""

    rank: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Rank -> executor: it stops. The message is a sentence; `traceback` is for the log."""

    rank: int
    message: str
    traceback: str


class StepDone(msgspec.Struct, frozen=True, tag="done"):
    """Rank -> executor: what one attention group sampled, from its first rank of the last pipeline stage."""

    step_id: int
    group: int  # the attention group: the rank's dp index
    output: GroupOutput


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    """Rank -> executor: timings of a measured step."""

    timings: RankTimings


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Executor -> rank: meet the others at this address, load the weights, allocate the cache."""

    init_method: str  # tcp://address:port of the first rank's host
    num_blocks: int
    num_swap_blocks: int
    num_threads: int
    keeps_fp8: bool  # FP8 weights are not dequantized: every rank's device multiplies them


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Executor -> rank: compute this step."""

    step: StepInput


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Executor -> rank: end."""


FromRank = Hello | Loading | Ready | Failed | StepDone | Measured
ToRank = Begin | Run | Stop
