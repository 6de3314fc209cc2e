"""The thread that runs a replica's engine: calls in, steps to the ranks, one frame per step and ingress out."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import zmq

from ridgewalk.engine.core import EngineCore
from ridgewalk.engine.executor import Executor, ExecutorError
from ridgewalk.engine.request import FinishReason, Request
from ridgewalk.engine.scheduler import RequestTooLargeError
from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.engine.stats import EngineStats
from ridgewalk.engine.step import RankTimings
from ridgewalk.engine.step_meter import StepMeans
from ridgewalk.engine.step_result import NewToken, StepResult
from ridgewalk.replica.call_ledger import CallLedger, CallRecord
from ridgewalk.replica.channel_server import ChannelServer
from ridgewalk.replica.command_queue import CommandQueue
from ridgewalk.replica.expert_load_recorder import ExpertLoadRecorder
from ridgewalk.replica.protocol import (
    Finish,
    GenerateCall,
    GenerateReply,
    GroupLoad,
    Introduction,
    LoadReport,
    MetricsQuery,
    ReplicaMetrics,
    ReplyStatus,
    SequenceEnd,
    SequenceSpec,
    TokenChunk,
    ToReplica,
)
from ridgewalk.replica.waiting_limit import WaitingLimit

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 0.1
"""Every ingress hears of the replica's load at least so often, idle or not."""

STUCK_AFTER_S = 60.0
"""With work to do and no step finished for so long, the ranks are stuck."""


class StepRecorder(Protocol):
    """Takes in what the engine measured; implemented by the metrics."""

    def on_admitted(self, queue_seconds: float) -> None:
        """A sequence was scheduled for the first time, so long after it arrived."""
        ...

    def on_ended(self, request: Request) -> None:
        """A sequence ended."""
        ...

    def on_timings(self, ranks: list[RankTimings]) -> None:
        """A measured step, one entry per rank."""
        ...

    def on_stats(self, stats: EngineStats) -> None:
        """The engine's state now."""
        ...

    def snapshot(self) -> bytes:
        """All that was recorded, for a scrape."""
        ...


@dataclass(frozen=True)
class _Submit:
    call: GenerateCall
    reply: Callable[[GenerateReply], None]


@dataclass(frozen=True)
class _Cancel:
    request_id: str


class EngineLoop:
    """Owns the engine, the executor and the channel; other threads reach it only through the methods here."""

    def __init__(
        self,
        scheduler_config: SchedulerConfig,
        executor: Executor,
        recorder: StepRecorder,
        address: str,
        max_waiting: int,
        executor_socket: zmq.Socket[bytes] | None = None,
        expert_loads: ExpertLoadRecorder | None = None,
    ) -> None:
        self._core = EngineCore(scheduler_config, executor, time.monotonic)
        self._recorder = recorder
        self._expert_loads = expert_loads
        self._limit = WaitingLimit(max_waiting)
        self._num_seats = scheduler_config.max_num_seqs * scheduler_config.num_groups
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._channel = ChannelServer(self._context, address)
        self._ledger = CallLedger()
        self._replies: dict[str, Callable[[GenerateReply], None]] = {}
        self._owners: dict[int, CallRecord] = {}  # by seq_id
        self._awaiting_admission: list[Request] = []
        self._commands: CommandQueue[_Submit | _Cancel | Introduction] = CommandQueue()
        self._poller = zmq.Poller()
        for source in (self._commands.read_fd, self._channel.socket, executor_socket):
            if source is not None:
                self._poller.register(source, zmq.POLLIN)
        self._executor_is_polled = executor_socket is not None
        self._last_report = 0.0
        self._peaks: list[float | None] = [None] * scheduler_config.num_groups  # as predicted for `_num_predicted`
        self._num_predicted = 0  # running sequences
        self._stopping = False
        self.failure: str | None = None
        self.endpoint, self.epoch = self._channel.endpoint, self._channel.epoch
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- from other threads -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, call: GenerateCall, reply: Callable[[GenerateReply], None]) -> None:
        """Queue a call. ``reply`` is called once, on the engine's thread."""
        self._commands.put(_Submit(call, reply))

    def cancel(self, request_id: str) -> None:
        """Abort what is left of a call; nobody waits for its reply."""
        self._commands.put(_Cancel(request_id))

    def introduce(self, introduction: Introduction) -> None:
        """Let an ingress attach to the channel."""
        self._commands.put(introduction)

    def metrics(self) -> ReplicaMetrics:
        """What a scrape reads, for an ingress that is not attached."""
        return self._metrics(0)

    def problem(self) -> str | None:
        """A sentence when the replica should be replaced, else None."""
        if self.failure is not None:
            return self.failure
        if self._core.has_work and time.monotonic() - self._core.last_progress > STUCK_AFTER_S:
            return f"no step finished for {STUCK_AFTER_S:.0f} s although there is work"
        return None

    def stop(self) -> None:
        """End the thread and the ranks. Idempotent."""
        self._stopping = True
        self._commands.wake()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._commands.close()

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception as error:
            self._fail(error)
        finally:
            self._core.executor.close()
            self._channel.close()
            self._context.term()
            if self._expert_loads is not None:
                self._expert_loads.close()
        while not self._stopping:  # refuse what still comes until Serve replaces the replica
            self._commands.wait(1.0)
            self._refuse_commands()

    def _turn(self) -> None:
        now = time.monotonic()
        messages = self._channel.receive()  # before the commands: who is introduced, and attaches at once, is known
        self._take_commands(now)
        self._take_messages(messages, now)
        results = self._core.pump()
        self._note_admissions()
        self._deliver(results, time.monotonic())
        for timings in self._core.executor.take_timings():
            self._recorder.on_timings(timings)
            if self._expert_loads is not None:
                self._expert_loads.on_timings(timings)
        if now - self._last_report >= REPORT_EVERY_S:
            self._report(now)
        # An in-process executor has no socket to wait on: its steps run when they are collected.
        may_wait = self._executor_is_polled or self._core.scheduler.num_in_flight == 0
        self._poller.poll(REPORT_EVERY_S * 1000 if may_wait else 0)

    def _take_commands(self, now: float) -> None:
        for command in self._commands.drain():
            if isinstance(command, _Submit):
                self._start_call(command, now)
            elif isinstance(command, _Cancel):
                record = self._ledger.get(command.request_id)
                if record is not None:
                    self._finish(record, -1, FinishReason.ABORT, now)
            else:
                self._channel.introduce(command, now)

    def _refuse_commands(self) -> None:
        for command in self._commands.drain():
            if isinstance(command, _Submit):
                command.reply(GenerateReply(ReplyStatus.LOST))

    def _start_call(self, command: _Submit, now: float) -> None:
        call = command.call
        if self._ledger.was_aborted(call.request_id):
            ends = [SequenceEnd(spec.index, "abort", len(spec.output_token_ids)) for spec in call.sequences]
            command.reply(GenerateReply(ReplyStatus.DONE, ends))
            return
        if not self._channel.is_attached(call.ingress_id) or self._ledger.is_open(call.request_id):
            command.reply(GenerateReply(ReplyStatus.MOVED))  # nobody would hear its tokens
            return
        scheduler = self._core.scheduler
        num_free = 0 if scheduler.throttled else max(0, self._num_seats - scheduler.num_running)
        load = len(call.sequences), scheduler.num_waiting, num_free
        if not call.resumed and self._limit.refuses(*load):
            retry_after_s = self._limit.retry_after(*load, now)
            command.reply(GenerateReply(ReplyStatus.OVERLOADED, retry_after_s=retry_after_s))
            return
        record = self._ledger.open(call)
        self._replies[call.request_id] = command.reply
        for spec in call.sequences:
            self._start_sequence(record, spec, now)

    def _start_sequence(self, record: CallRecord, spec: SequenceSpec, now: float) -> None:
        try:
            request = self._core.add(
                record.call.request_id, spec.index, spec.prompt_token_ids, spec.sampling, spec.output_token_ids
            )
        except ValueError as error:
            status = 400 if isinstance(error, RequestTooLargeError) else 500
            end = SequenceEnd(spec.index, "error", len(spec.output_token_ids), error=str(error), status=status)
            self._end_sequence(record, end, now)()
            return
        record.requests[spec.index] = request
        record.first_offset[spec.index] = len(spec.output_token_ids)
        if spec.sampling.logprobs is not None:
            record.logprobs[spec.index] = []
        self._owners[request.seq_id] = record
        self._awaiting_admission.append(request)

    def _take_messages(self, messages: list[tuple[bytes, ToReplica]], now: float) -> None:
        for ingress_id, message in self._channel.accept(messages, now):
            if isinstance(message, MetricsQuery):
                self._channel.send(ingress_id, [], self._load(), self._metrics(message.number))
                continue
            record = self._ledger.get(message.request_id)
            if record is None:
                if isinstance(message, Finish) and message.index == -1:
                    self._ledger.abort_early(message.request_id, now)
                continue
            if record.call.ingress_id != ingress_id:
                continue
            if isinstance(message, Finish):
                reason = FinishReason.STOP if message.reason == "stop" else FinishReason.ABORT
                self._finish(record, message.index, reason, now)
            else:
                self._resend(record, message.index, message.offset)
        for ingress_id in self._channel.forget_silent(now):
            records = self._ledger.open_calls(ingress_id)
            if records:
                logger.warning("ingress %s is gone; aborting its %d calls", ingress_id, len(records))
            for record in records:
                self._finish(record, -1, FinishReason.ABORT, now)

    def _finish(self, record: CallRecord, index: int, reason: FinishReason, now: float) -> None:
        for request in list(record.requests.values()):
            if index in (-1, request.index) and self._core.finish(request, reason):
                reply = self._ended(request, now)
                self._resend(record, request.index, request.num_output_tokens)
                reply()

    def _resend(self, record: CallRecord, index: int, offset: int) -> None:
        """Send what a sequence has produced from ``offset`` on, its end included."""
        chunk = self._ledger.chunk_from(record, index, offset)
        if chunk is not None:
            self._channel.send(record.call.ingress_id, [chunk], self._load())

    def _deliver(self, results: list[StepResult], now: float) -> None:
        """One frame per ingress with all that is new, then the replies of the calls that are complete."""
        if not results:
            return
        ended = {request.seq_id: self._owners[request.seq_id] for result in results for request in result.ended}
        tokens = [token for result in results for token in result.new_tokens]
        replies = [self._ended(request, now) for result in results for request in result.ended]
        frames: defaultdict[str, list[TokenChunk]] = defaultdict(list)
        for token in tokens:
            record = ended.get(token.request.seq_id) or self._owners[token.request.seq_id]
            frames[record.call.ingress_id].append(self._chunk(record, token))
        load = self._load()
        for ingress_id, chunks in frames.items():
            self._channel.send(ingress_id, chunks, load)
        for reply in replies:
            reply()

    def _chunk(self, record: CallRecord, token: NewToken) -> TokenChunk:
        request = token.request
        logprobs = None
        if token.logprobs is not None:
            record.logprobs[request.index].append(token.logprobs)
            logprobs = [token.logprobs]
        end = record.ends.get(request.index) if token.offset == request.num_output_tokens - 1 else None
        return TokenChunk(
            request.request_id, request.index, token.offset, [token.token_id], logprobs, request.num_cached_tokens, end
        )

    def _ended(self, request: Request, now: float) -> Callable[[], None]:
        """Note a sequence's end; the returned function answers its call if that is complete now."""
        record = self._owners.pop(request.seq_id)
        self._recorder.on_ended(request)
        assert request.finish_reason is not None
        if request.finish_reason is not FinishReason.ABORT:
            self._limit.note_end(now)
        end = SequenceEnd(
            request.index,
            request.finish_reason.value,
            request.num_output_tokens,
            request.num_cached_tokens,
            request.stop_token_id,
        )
        return self._end_sequence(record, end, now)

    def _end_sequence(self, record: CallRecord, end: SequenceEnd, now: float) -> Callable[[], None]:
        reply = self._ledger.end_sequence(record, end, now)
        if reply is None:
            return lambda: None
        answer = self._replies.pop(record.call.request_id)
        return lambda: answer(reply)

    def _note_admissions(self) -> None:
        still_waiting = []
        for request in self._awaiting_admission:
            if request.first_scheduled_time is not None:
                self._recorder.on_admitted(request.first_scheduled_time - request.arrival_time)
            elif request.finish_reason is None:
                still_waiting.append(request)
        self._awaiting_admission = still_waiting

    def _report(self, now: float) -> None:
        self._last_report = now
        self._ledger.forget_old(now)
        stats = self._core.stats()
        self._recorder.on_stats(stats)
        self._note_peaks([group.predicted_peak_blocks for group in stats.groups])
        load = self._load(self._core.meter.take())
        for ingress_id in self._channel.ingress_ids():
            self._channel.send(ingress_id, [], load)

    def _metrics(self, number: int) -> ReplicaMetrics:
        return ReplicaMetrics(self._recorder.snapshot(), self._channel.introductions(), number)

    def _load(self, steps: StepMeans | None = None) -> LoadReport:
        """The queues as they are; peaks as of the last report, or since then of the last admission.

        Frames are many, and a forecast is not free. But what has begun must count before more is sent.
        """
        scheduler = self._core.scheduler
        if scheduler.num_running > self._num_predicted:
            self._note_peaks(scheduler.predicted_peaks())
        groups = [
            GroupLoad(pool.num_blocks, pool.num_used, pool.num_cached, len(group.running), peak)
            for group, peak in zip(scheduler.groups, self._peaks, strict=True)
            for pool in (group.kv.pool,)
        ]
        return LoadReport(groups, scheduler.num_running, scheduler.num_waiting, self._num_seats, steps)

    def _note_peaks(self, peaks: list[float | None]) -> None:
        self._peaks, self._num_predicted = peaks, self._core.scheduler.num_running

    def _fail(self, error: Exception) -> None:
        """The ranks are gone: every open call moves to another replica, with the tokens its ingress has."""
        self.failure = str(error)
        if isinstance(error, ExecutorError):
            logger.error("the replica failed: %s", error)
        else:
            logger.exception("the engine failed")
        for request_id, reply in self._replies.items():
            reply(GenerateReply(ReplyStatus.LOST, self._ledger.ends_so_far(request_id)))
        self._replies.clear()
        self._refuse_commands()
