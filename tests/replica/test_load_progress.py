"""What is said while weights load."""

from __future__ import annotations

import logging
import threading
import time
from types import SimpleNamespace

import msgspec
import pytest
import zmq

from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.replica.engine_config import EngineConfig
from ridgewalk.replica.engine_replica import PROGRESS_EVERY_S, EngineReplica
from ridgewalk.replica.rank_protocol import Hello, Loading, RankLaunch, Ready
from ridgewalk.replica.zmq_executor import LoadProgress, ZmqExecutor
from ridgewalk.zoo import zoo_path


class ScriptedRanks:
    """Two ranks, the second of which is late to say how much it has to read."""

    def start(self, launches: list[RankLaunch]) -> None:
        threading.Thread(target=self._speak, args=(launches,), daemon=True).start()

    def ended(self) -> None:
        """All run."""

    def stop(self) -> None:
        """Nothing runs."""

    def _speak(self, launches: list[RankLaunch]) -> None:
        encode = msgspec.msgpack.Encoder().encode
        with zmq.Context() as context, context.socket(zmq.DEALER) as one, context.socket(zmq.DEALER) as two:
            for socket, launch in zip((one, two), launches, strict=True):
                socket.setsockopt(zmq.IDENTITY, launch.identity)
                socket.connect(launch.endpoint)
                socket.send(encode(Hello(launch.rank, 1, "127.0.0.1", 1, 2**30, "here", False, 2**30)))
            for socket in (one, two):
                socket.recv()  # Begin
            for read in (0, 40, 70):
                one.send(encode(Loading(0, read, 100)))
            time.sleep(0.3)
            two.send(encode(Loading(1, 0, 60)))
            two.send(encode(Loading(1, 60, 60)))
            two.send(encode(Ready(1)))
            time.sleep(0.1)
            one.send(encode(Loading(0, 100, 100)))
            one.send(encode(Ready(0)))


def test_the_total_is_told_once_every_rank_has_said_its_part() -> None:
    path = zoo_path("demo-dense")
    config = EngineConfig(
        model_name="m", placement="TP2", model_path=str(path), dtype="bfloat16", tp=2, max_model_len=128,
        max_num_seqs=4, max_num_batched_tokens=64, block_size=16, max_waiting=1, num_blocks=64,
    )  # fmt: skip
    told: list[LoadProgress] = []
    ZmqExecutor(config, ModelSpec.from_folder(path), ScriptedRanks(), on_progress=told.append).close()
    assert told == [LoadProgress(70, 160), LoadProgress(130, 160), LoadProgress(160, 160)]


def test_a_model_that_is_read_at_once_says_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = EngineReplica.__new__(EngineReplica)
    replica._config = SimpleNamespace(model_name="m", placement="TP2")  # type: ignore[assignment]
    replica._progress_logged = None
    monkeypatch.setattr(logging.getLogger("ridgewalk"), "propagate", True)
    with caplog.at_level(logging.INFO, "ridgewalk"):
        replica._log_progress(LoadProgress(1000, 2**22))
        replica._log_progress(LoadProgress(2**22, 2**22))
        assert caplog.messages == []
        replica._progress_logged = time.monotonic() - PROGRESS_EVERY_S
        replica._log_progress(LoadProgress(2**20, 2**22))
    assert caplog.messages == ["m TP2: 1 of 4 MiB of weights read"]
