"""The engine loop and the ingress's stream, joined by real sockets: fake ranks, no Ray."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable

import msgspec
import pytest
import zmq

from ridgewalk.api.backend import BackendError, Sequence
from ridgewalk.engine.executor import ExecutorError
from ridgewalk.engine.request import Request
from ridgewalk.engine.sampling import SamplingParams
from ridgewalk.engine.scheduler_config import SchedulerConfig
from ridgewalk.engine.stats import EngineStats
from ridgewalk.engine.step import RankTimings, StepOutput
from ridgewalk.engine.step_meter import StepMeans
from ridgewalk.replica.engine_loop import EngineLoop
from ridgewalk.replica.protocol import Attach, ChannelAddress, Frame, GenerateCall, GenerateReply, Introduction
from ridgewalk.replica.replica_link import ReplicaLink
from ridgewalk.replica.request_stream import RequestStream
from ridgewalk.routing.open_sequence import NewSequence, OpenSequence
from tests.engine.fake_ranks import FakeExecutor, next_token

BLOCK_SIZE = 4


class Recorder:
    """Keeps what the metrics would be told."""

    def __init__(self) -> None:
        self.ended: list[Request] = []
        self.stats: EngineStats | None = None

    def on_admitted(self, queue_seconds: float) -> None:
        assert queue_seconds >= 0

    def on_ended(self, request: Request) -> None:
        self.ended.append(request)

    def on_timings(self, ranks: list[RankTimings]) -> None:
        raise AssertionError("the fake ranks measure nothing")

    def on_stats(self, stats: EngineStats) -> None:
        self.stats = stats

    def snapshot(self) -> bytes:
        return f"{len(self.ended)} ended".encode()


class GatedExecutor(FakeExecutor):
    """Runs a step only when let; can die."""

    def __init__(self) -> None:
        super().__init__(BLOCK_SIZE)
        self.gate = threading.Semaphore(0)
        self.open = True
        self.dead = False

    def collect(self) -> list[StepOutput]:
        if self.dead:
            raise ExecutorError("rank 0 ended: killed by SIGKILL")
        if not self.open and not (self.submitted and self.gate.acquire(blocking=False)):
            return []
        return super().collect()


class Replica:
    """One replica's loop, with the handle that an ingress would have."""

    def __init__(self, replica_id: str, max_waiting: int = 100, steps_in_flight: int = 1) -> None:
        self.replica_id = replica_id
        self.executor = GatedExecutor()
        self.call_delay_s = 0.0
        self.recorder = Recorder()
        config = SchedulerConfig(
            num_blocks=64,
            block_size=BLOCK_SIZE,
            max_model_len=128,
            max_num_seqs=4,
            max_steps_in_flight=steps_in_flight,
            schedule_ahead=steps_in_flight > 1,
        )
        self.loop = EngineLoop(config, self.executor, self.recorder, "127.0.0.1", max_waiting)
        self.loop.start()
        self.generate = self  # handle.generate.remote(...)

    def remote(self, call: bytes, replica_id: str) -> asyncio.Task[bytes]:
        assert replica_id == self.replica_id
        return asyncio.create_task(self._generate(call))

    async def _generate(self, call: bytes) -> bytes:
        await asyncio.sleep(self.call_delay_s)  # Ray is slower than the channel
        event_loop = asyncio.get_running_loop()
        reply: asyncio.Future[GenerateReply] = event_loop.create_future()
        decoded = msgspec.msgpack.decode(call, type=GenerateCall)
        self.loop.submit(decoded, lambda value: event_loop.call_soon_threadsafe(_set, reply, value))
        try:
            return msgspec.msgpack.encode(await reply)
        except asyncio.CancelledError:
            self.loop.cancel(decoded.request_id)
            raise

    @property
    def num_used_blocks(self) -> int:
        return self.loop._core.scheduler.groups[0].kv.pool.num_used


def _set(future: asyncio.Future[GenerateReply], value: GenerateReply) -> None:
    if not future.done():
        future.set_result(value)


class Pool:
    """Stands in for `ReplicaPool`: the first link that can take a request."""

    def __init__(self, links: list[ReplicaLink]) -> None:
        self.links = links
        self.sent: list[OpenSequence] = []
        self.ended: list[tuple[int, bool]] = []  # output tokens, and whether it ended by itself

    def choose(self, request: Iterable[NewSequence], excluded: Collection[str] = ()) -> ReplicaLink | None:
        return next((link for link in self.links if link.routable and link.replica_id not in excluded), None)

    def on_sent(self, new: NewSequence, link: ReplicaLink) -> OpenSequence:
        self.sent.append(OpenSequence(new, link.replica_id, 0.0, new.num_resumed_tokens))
        return self.sent[-1]

    def on_ended(self, sequence: OpenSequence, stopped: bool) -> None:
        self.ended.append((sequence.num_output_tokens, stopped))

    async def wait_ready(self, timeout_s: float) -> bool:
        return False


Connect = Callable[..., Awaitable[tuple[Pool, list[Replica]]]]


@pytest.fixture
async def connect(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Connect]:
    # These links beat once, at their start: no pool repeats it. A machine that stops for seconds must not end them.
    monkeypatch.setattr("ridgewalk.replica.channel_server.HEARTBEAT_TIMEOUT_S", 600.0)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    replicas: list[Replica] = []
    links: list[ReplicaLink] = []

    async def make(count: int = 1, **options: int) -> tuple[Pool, list[Replica]]:
        for number in range(count):
            replica = Replica(f"r{number}", **options)
            replica.loop.introduce(Introduction("ingress", "secret", "127.0.0.1:9"))
            address = ChannelAddress(replica.loop.endpoint, replica.loop.epoch, BLOCK_SIZE, 1, True)
            links.append(ReplicaLink(context, replica, "TP1", f"r{number}", Attach("ingress", "secret"), address))  # type: ignore[arg-type]
            replicas.append(replica)
            await until(lambda: links[-1].routable)
        return Pool(links), replicas

    yield make
    for link in links:
        link.close()
    for replica in replicas:
        replica.loop.stop()
    context.term()


def stream(pool: Pool, prompts: list[list[int]], max_tokens: int = 8) -> RequestStream:
    sequences = [Sequence(prompt, SamplingParams(max_tokens=max_tokens)) for prompt in prompts]
    return RequestStream(pool, "ingress", uuid.uuid4().hex, sequences)  # type: ignore[arg-type]


async def collect(requests: RequestStream, count: int) -> tuple[list[list[int]], list[str | None]]:
    tokens: list[list[int]] = [[] for _ in range(count)]
    reasons: list[str | None] = [None] * count
    async for events in requests:
        for event in events:
            tokens[event.index] += event.token_ids
            reasons[event.index] = event.finish_reason or reasons[event.index]
    return tokens, reasons


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def len_until_stop(prompt: list[int], sampling: SamplingParams) -> int:
    tokens = expected(prompt, sampling.max_tokens)
    return next((at for at, token in enumerate(tokens, 1) if token in sampling.stop_token_ids), len(tokens))


async def until(condition: Callable[[], bool]) -> None:
    deadline = asyncio.get_running_loop().time() + 60
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "what was awaited did not come about"
        await asyncio.sleep(0.005)


def test_an_ingress_that_attaches_right_after_it_was_introduced_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SchedulerConfig(num_blocks=64, block_size=BLOCK_SIZE, max_model_len=128, max_num_seqs=4)
    loop = EngineLoop(config, FakeExecutor(BLOCK_SIZE), Recorder(), "127.0.0.1", 100)
    drain = loop._commands.drain
    with zmq.Context() as context, context.socket(zmq.DEALER) as ingress:
        ingress.setsockopt(zmq.LINGER, 0)

        def drain_and_see_it_come() -> list[object]:
            commands = drain()
            if not loop._channel.introductions():
                loop.introduce(Introduction("ingress", "secret", "127.0.0.1:9"))
                ingress.connect(loop.endpoint)
                ingress.send(msgspec.msgpack.encode(Attach("ingress", "secret")))
                assert loop._channel.socket.poll(60_000)
            return commands

        monkeypatch.setattr(loop._commands, "drain", drain_and_see_it_come)
        loop._turn()
        monkeypatch.undo()
        loop._turn()
        assert loop._channel.is_attached("ingress")
        loop._channel.close()
        loop._context.term()


async def test_every_token_of_every_sequence_arrives_once(connect: Connect) -> None:
    pool, _ = await connect()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
    tokens, reasons = await collect(stream(pool, prompts), 3)
    assert tokens == [expected(prompt, 8) for prompt in prompts]
    assert reasons == ["length"] * 3


async def test_the_router_hears_of_every_sequence_once_with_its_length_and_whether_it_ended_by_itself(
    connect: Connect,
) -> None:
    pool, _ = await connect()
    natural = SamplingParams(max_tokens=8, stop_token_ids=(expected([4], 3)[2],))
    sequences = [Sequence([4], natural), Sequence([1, 2, 3], SamplingParams(max_tokens=6))]
    await collect(RequestStream(pool, "ingress", "r", sequences), 2)  # type: ignore[arg-type]
    assert [(sent.new.num_prompt_tokens, sent.new.max_tokens, sent.new.may_stop) for sent in pool.sent] == [
        (1, 8, True),
        (3, 6, False),
    ]
    assert sorted(pool.ended) == [(len_until_stop([4], natural), True), (6, False)]


async def test_reports_say_how_long_steps_take(connect: Connect) -> None:
    pool, _ = await connect()
    link = pool.links[0]
    await collect(stream(pool, [[1], [2]], 60), 2)
    reported: list[StepMeans] = []
    await until(lambda: (reported.extend(link.take_steps()), sum(means.steps for means in reported) >= 60)[1])
    assert sum(means.steps for means in reported) == 60
    assert all(means.seconds > 0 and means.sequences <= 2 for means in reported)
    assert sum(means.steps * means.prefill_tokens for means in reported) == 0  # prompts of one token
    load = link.routing_load()
    assert (load.block_size, load.num_ranks, load.total_blocks, load.caches_prefixes) == (BLOCK_SIZE, 1, 64, True)


async def test_dropped_frames_are_asked_for_again(connect: Connect) -> None:
    pool, _ = await connect()
    link = pool.links[0]
    take, dropped = link._take, []

    def lossy(frame: Frame) -> None:
        if frame.chunks and len(dropped) < 5:
            dropped.append(frame)
            return
        take(frame)

    link._take = lossy  # type: ignore[method-assign]
    tokens, _ = await collect(stream(pool, [[1, 2]], 12), 1)
    assert len(dropped) == 5
    assert tokens == [expected([1, 2], 12)]


async def test_all_frames_lost_until_the_reply_are_asked_for_again(connect: Connect) -> None:
    pool, replicas = await connect()
    link = pool.links[0]
    take = link._take
    link._take = lambda frame: take(frame) if replicas[0].recorder.ended else None  # type: ignore[method-assign]
    tokens, _ = await collect(stream(pool, [[1, 2]], 6), 1)
    assert tokens == [expected([1, 2], 6)]


async def test_a_closed_stream_frees_its_blocks(connect: Connect) -> None:
    pool, (replica,) = await connect()
    replica.executor.open = False
    request = stream(pool, [[1] * 20], 50)
    replica.executor.gate.release(3)
    async for events in request:
        if events:
            break
    assert replica.num_used_blocks > 0
    await request.aclose()
    replica.executor.open = True
    await until(lambda: len(replica.recorder.ended) == 1)
    await until(lambda: replica.num_used_blocks == 0)
    assert replica.recorder.ended[0].finish_reason is not None
    assert replica.recorder.ended[0].finish_reason.value == "abort"


async def test_streams_continue_on_another_replica_when_one_dies(connect: Connect) -> None:
    pool, replicas = await connect(2)
    replicas[0].executor.open = False
    replicas[0].executor.gate.release(4)
    request = stream(pool, [[1, 2, 3], [4, 5]], 10)
    tokens: list[list[int]] = [[], []]
    async for events in request:
        for event in events:
            tokens[event.index] += event.token_ids
        if sum(map(len, tokens)) >= 4:
            replicas[0].executor.dead = True
    assert tokens == [expected([1, 2, 3], 10), expected([4, 5], 10)]
    assert replicas[0].loop.problem() == "rank 0 ended: killed by SIGKILL"
    resumed = [request for request in replicas[1].recorder.ended if request.num_computed_tokens]
    assert len(resumed) == 2


async def test_a_full_queue_is_refused_with_the_time_to_wait(connect: Connect) -> None:
    pool, (replica,) = await connect(max_waiting=2)
    replica.executor.open = False
    blocked = stream(pool, [[1]] * 6, 5)
    await until(lambda: replica.loop._core.scheduler.num_waiting == 2)
    with pytest.raises(BackendError) as refusal:
        await collect(stream(pool, [[2]]), 1)
    assert refusal.value.status == 429
    assert refusal.value.retry_after_s == 5.0  # nothing has ended yet: unknown
    replica.executor.open = True
    await collect(blocked, 6)
    await collect(stream(pool, [[2]] * 20), 20)  # an empty queue takes a request of any size


async def test_seats_that_kv_has_no_room_for_are_not_free(connect: Connect) -> None:
    pool, (replica,) = await connect(max_waiting=1)
    replica.executor.open = False
    long = [list(range(1, 101)), list(range(2, 102))]  # 25 of 64 blocks each; two of four seats
    blocked = stream(pool, [*long, list(range(3, 103))], 5)
    await until(lambda: replica.loop._core.scheduler.throttled)
    with pytest.raises(BackendError) as refusal:
        await collect(stream(pool, [[2]]), 1)
    assert refusal.value.status == 429
    replica.executor.open = True
    await collect(blocked, 3)


async def test_a_replica_with_room_is_tried_before_a_client_is_refused(connect: Connect) -> None:
    pool, replicas = await connect(2, max_waiting=1)
    replicas[0].executor.open = False
    blocked = stream(pool, [[1]] * 5, 3)
    await until(lambda: replicas[0].loop._core.scheduler.num_waiting == 1)
    tokens, _ = await collect(stream(pool, [[2]], 3), 1)
    assert tokens == [expected([2], 3)]
    replicas[0].executor.open = True
    await collect(blocked, 5)


async def test_a_resumed_request_is_not_refused_for_a_full_queue(connect: Connect) -> None:
    pool, replicas = await connect(2, max_waiting=1)
    replicas[0].executor.open = False
    replicas[0].executor.gate.release(3)
    request = stream(pool, [[1, 2]], 6)
    reader = asyncio.create_task(collect(request, 1))
    await until(lambda: bool(request._states[0].token_ids))
    replicas[1].executor.open = False
    pool.links[0].avoid(60)
    blocked = stream(pool, [[3]] * 5, 3)
    await until(lambda: replicas[1].loop._core.scheduler.num_waiting == 1)
    replicas[0].executor.dead = True
    await until(lambda: replicas[1].loop._core.scheduler.num_waiting == 2)
    replicas[1].executor.open = True
    tokens, _ = await reader
    assert tokens == [expected([1, 2], 6)]
    await collect(blocked, 5)


async def test_a_request_that_can_never_fit_is_a_client_error(connect: Connect) -> None:
    pool, _ = await connect()
    with pytest.raises(BackendError, match="120 tokens") as refusal:
        await collect(stream(pool, [[1] * 120], 50), 1)
    assert refusal.value.status == 400


async def test_a_stop_from_the_ingress_ends_one_sequence(connect: Connect) -> None:
    pool, (replica,) = await connect()
    replica.executor.open = False
    request = stream(pool, [[1, 2], [3]], 6)
    replica.executor.gate.release(2)
    seen = 0
    stopped = False
    reasons: dict[int, str] = {}
    async for events in request:
        seen += sum(len(event.token_ids) for event in events)
        if seen >= 2 and not stopped:
            stopped = True
            request.finish(0, "stop")
            await until(lambda: len(replica.recorder.ended) == 1)
            replica.executor.open = True
        for event in events:
            if event.finish_reason:
                reasons[event.index] = event.finish_reason
    assert reasons == {0: "stop", 1: "length"}


async def test_frames_with_another_secret_or_epoch_are_ignored(connect: Connect) -> None:
    pool, (replica,) = await connect()
    link = pool.links[0]
    link._address = msgspec.structs.replace(link._address, epoch="another")
    load = link.load
    request = stream(pool, [[1]], 2)
    await until(lambda: len(replica.recorder.ended) == 1 or request._error is not None)
    assert request._error is None
    assert link.load is load
    await request.aclose()
    request._driver.cancel()


async def test_metrics_come_over_the_channel_between_the_tokens(connect: Connect) -> None:
    pool, (replica,) = await connect()
    request = stream(pool, [[1, 2]], 8)
    answers = await asyncio.gather(*(pool.links[0].ask_metrics() for _ in range(3)))
    assert await collect(request, 1) == ([expected([1, 2], 8)], ["length"])
    answers.append(await pool.links[0].ask_metrics())
    assert answers[-1] is not None
    assert answers[-1].snapshot == b"1 ended"
    assert all(answer is not None and answer.ingresses == replica.loop.metrics().ingresses for answer in answers)


async def test_who_asks_for_metrics_is_told_when_the_link_is_lost(connect: Connect) -> None:
    pool, (replica,) = await connect()
    replica.loop.stop()
    asked = asyncio.create_task(pool.links[0].ask_metrics())
    await asyncio.sleep(0)
    pool.links[0].close()
    assert await asked is None
    assert await pool.links[0].ask_metrics() is None


async def test_a_silent_ingress_loses_its_requests(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, (replica,) = await connect()
    replica.executor.open = False
    request = stream(pool, [[1] * 8], 20)
    await until(lambda: replica.num_used_blocks > 0)
    monkeypatch.setattr("ridgewalk.replica.channel_server.HEARTBEAT_TIMEOUT_S", 0.2)
    await until(lambda: len(replica.recorder.ended) == 1)
    assert replica.recorder.ended[0].finish_reason is not None
    assert replica.recorder.ended[0].finish_reason.value == "abort"
    request._driver.cancel()


async def test_a_sequence_that_has_ended_is_not_started_again_elsewhere(connect: Connect) -> None:
    pool, replicas = await connect(2)
    replicas[0].executor.open = False
    replicas[0].executor.gate.release(3)
    sequences = [Sequence([1], SamplingParams(max_tokens=2)), Sequence([2], SamplingParams(max_tokens=9))]
    request = RequestStream(pool, "ingress", "r", sequences)  # type: ignore[arg-type]
    tokens: list[list[int]] = [[], []]
    reasons: list[str] = []
    async for events in request:
        for event in events:
            tokens[event.index] += event.token_ids
            if event.finish_reason:
                reasons.append(f"{event.index} {event.finish_reason}")
                replicas[0].executor.dead = True  # the first end came before the second sequence was done
    assert tokens == [expected([1], 2), expected([2], 9)]
    assert reasons == ["0 length", "1 length"]
    assert [request.index for request in replicas[1].recorder.ended] == [1]


async def test_a_lost_link_moves_its_streams_and_frees_the_old_blocks(connect: Connect) -> None:
    pool, replicas = await connect(2)
    replicas[0].executor.open = False
    replicas[0].executor.gate.release(3)
    request = stream(pool, [[1, 2]], 8)
    reader = asyncio.create_task(collect(request, 1))
    await until(lambda: len(request._states[0].token_ids) == 3)
    pool.links[0].close()
    tokens, _ = await reader
    assert tokens == [expected([1, 2], 8)]
    replicas[0].executor.open = True
    await until(lambda: len(replicas[0].recorder.ended) == 1 and replicas[0].num_used_blocks == 0)


async def test_an_abort_that_overtakes_its_call_keeps_it_from_starting(connect: Connect) -> None:
    pool, (replica,) = await connect()
    replica.call_delay_s = 0.3
    request = stream(pool, [[1] * 8], 50)
    await asyncio.sleep(0)
    await until(lambda: request._call is not None)
    await request.aclose()
    await until(lambda: bool(replica.loop._ledger._aborted_early))
    await asyncio.gather(*(task for task in asyncio.all_tasks() if "Replica._generate" in repr(task)))
    assert replica.recorder.ended == []
    assert replica.num_used_blocks == 0


async def test_an_error_reaches_the_reader_whenever_it_looks(connect: Connect) -> None:
    pool, (replica,) = await connect()
    for _ in range(20):
        request = stream(pool, [[1] * 120], 50)
        await until(lambda request=request: request._finished)
        with pytest.raises(BackendError, match="120 tokens"):
            await collect(request, 1)
    assert replica.loop.problem() is None


async def test_nobody_on_the_network_can_break_a_replica(connect: Connect) -> None:
    pool, (replica,) = await connect()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(replica.loop.endpoint)
    nested = b"\x91" * 100_000 + b"\xc0"
    attach = msgspec.msgpack.encode(Attach("ingress", "guess\u00e9"))
    for frames in ([b"a", b"b"], [b""], [b"\xff" * 10], [nested], [attach], [b"\x82\xa4type\xa6attach\xa1\xff\xc0"]):
        stranger.send_multipart(frames)
    finish = msgspec.msgpack.encode({"type": "finish", "request_id": "r", "index": -1, "reason": "abort"})
    stranger.send(finish)
    tokens, _ = await collect(stream(pool, [[1, 2]], 8), 1)
    assert tokens == [expected([1, 2], 8)]
    assert replica.loop.problem() is None
    assert replica.loop._ledger._aborted_early == {}
    stranger.close(linger=0)
    context.term()


async def test_steps_scheduled_ahead_arrive_without_gaps(connect: Connect) -> None:
    pool, (replica,) = await connect(steps_in_flight=2)
    replica.executor.per_collect = 2
    link = pool.links[0]
    sent: list[object] = []
    send = link.send
    link.send = lambda message: (sent.append(message), send(message))[1]  # type: ignore[method-assign]
    tokens, _ = await collect(stream(pool, [[1, 2, 3]], 12), 1)
    assert tokens == [expected([1, 2, 3], 12)]
    assert sent == []
