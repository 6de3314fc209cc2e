"""The whole road: HTTP through HAProxy, ingress, engine replica, tensor-parallel ranks, and back."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import httpx
import openai
import psutil
import pytest

from ridgewalk.config import ServeConfig
from ridgewalk.load.scrape import Sample, Scrape
from ridgewalk.load.streaming_client import stream_completion
from ridgewalk.zoo.problems import is_right, sample_problems
from tests.service.conftest import MODEL

pytestmark = pytest.mark.ray

GROWS = ("_total", "_bucket", "_count", "_sum")
USED = ("ridgewalk_kv_blocks", {"state": "used"})


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Poll something that only a scrape can tell."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def idle(scrape: Callable[[], Scrape]) -> Callable[[], bool]:
    def check() -> bool:
        now = scrape()
        return (
            now.total(USED[0], **USED[1]) == 0
            and now.total("ridgewalk_num_requests_running") == 0
            and now.total("ridgewalk_num_requests_waiting") == 0
        )

    return check


def counters_of(scrape: Scrape) -> dict[Sample, float]:
    """All samples that only grow, but for the count of scrapes itself."""
    return {
        sample: value
        for sample, value in scrape.samples.items()
        if sample[0].endswith(GROWS) and sample[0] != "ridgewalk_scrapes_total"
    }


def body(question: str = "What is 27 + 58?", **fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0, **fields}


def both_ingresses_answer(scrape: Scrape) -> bool:
    ingresses = scrape.values_of("ridgewalk_scrapes_total", "ingress")
    replicas = scrape.values_of("ridgewalk_engine_steps_total", "replica")
    answered = [scrape.total("ridgewalk_scrapes_total", ingress=ingress) for ingress in ingresses]
    return len(answered) == 2 and all(answered) and len(replicas) == 1


async def scrapes_under_load(service_url: str) -> int:
    """Samples that grew while both ingresses took requests and were scraped in turns; none is lost or goes back."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:

        async def read() -> Scrape:
            async with session.get(f"{service_url}/metrics") as reply:
                return Scrape.parse(await reply.text())

        first = last = await read()
        url = f"{service_url}/v1/chat/completions"
        bodies = [body(problem.question) for problem in sample_problems(12, seed=8)]
        load = [asyncio.create_task(stream_completion(session, url, each)) for each in bodies]
        while not all(task.done() for task in load):
            now = await read()
            if any(now.total(f"ridgewalk_scrape_missing_{who}") for who in ("ingresses", "replicas")):
                continue  # on a crowded machine one may answer too late, and the scrape says so
            assert counters_of(last).keys() <= counters_of(now).keys()
            assert {key: value for key, value in counters_of(last).items() if now.samples[key] < value} == {}
            last = now
        await asyncio.gather(*load)
    grown = last.since(first)
    for ingress in last.values_of("ridgewalk_scrapes_total", "ingress"):
        assert grown.total("ridgewalk_scrapes_total", ingress=ingress) > 0
        assert grown.total("ridgewalk_requests_total", ingress=ingress) > 0
    return sum(value > 0 for value in counters_of(grown).values())


def test_the_openai_client_gets_reasoning_and_answer(service_url: str) -> None:
    client = openai.OpenAI(base_url=f"{service_url}/v1", api_key="none", max_retries=0)
    reply = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "What is 27 + 58?"}], temperature=0
    )
    message = reply.choices[0].message
    assert message.content is not None
    assert message.content.strip() == "85"
    assert reply.choices[0].finish_reason == "stop"
    assert message.reasoning_content == message.reasoning  # type: ignore[attr-defined]
    assert reply.usage is not None
    assert reply.usage.completion_tokens_details is not None
    assert 0 < (reply.usage.completion_tokens_details.reasoning_tokens or 0) < reply.usage.completion_tokens

    pieces = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is 27 + 58?"}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices).strip() == "85"
    assert pieces[-1].usage == reply.usage or pieces[-1].usage.completion_tokens == reply.usage.completion_tokens  # type: ignore[union-attr]


def test_many_clients_at_once_get_right_answers_and_exact_counts(
    service_url: str, scrape: Callable[[], Scrape]
) -> None:
    problems = sample_problems(40, seed=7)
    assert eventually(idle(scrape))  # replicas report ten times a second: what came before must be in
    before = scrape()

    async def ask_all() -> list[tuple[bool, int]]:
        async with aiohttp.ClientSession() as session:
            answers = await asyncio.gather(
                *(
                    stream_completion(session, f"{service_url}/v1/chat/completions", body(problem.question))
                    for problem in problems
                )
            )
        return [
            (is_right(problem, answer.content), answer.completion_tokens)
            for problem, answer in zip(problems, answers, strict=True)
        ]

    results = asyncio.run(ask_all())
    assert sum(right for right, _ in results) >= 36
    assert eventually(idle(scrape))
    window = scrape().since(before)
    assert window.total("ridgewalk_generation_tokens_total") == sum(tokens for _, tokens in results)
    assert window.total("ridgewalk_request_success_total") == 40
    assert window.total("ridgewalk_collective_seconds_count", op="all_reduce", phase="wait") > 0


def test_a_client_that_leaves_frees_its_blocks(service_url: str, scrape: Callable[[], Scrape]) -> None:
    def departures() -> float:
        return scrape().total("ridgewalk_request_errors_total", model_name=MODEL, status="499")

    before = departures()
    fields = {"max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{service_url}/v1/chat/completions", json=body(**fields), timeout=30) as reply:
        lines = reply.iter_lines()  # kept: httpx hangs up when the iterator is gone
        next(lines)
        assert eventually(lambda: scrape().total("ridgewalk_num_requests_running") == 1, 3)
    assert eventually(idle(scrape), 5)
    assert eventually(lambda: departures() == before + 1, 5)
    time.sleep(0.2)
    assert departures() == before + 1


def test_a_client_that_leaves_before_its_reply_frees_its_blocks(service_url: str, scrape: Callable[[], Scrape]) -> None:
    """Without a stream, and with its body in a packet of its own, as most clients send it."""

    def departures() -> float:
        return scrape().total("ridgewalk_request_errors_total", model_name=MODEL, status="499")

    before = departures()
    with httpx.Client() as client:
        client.post(f"{service_url}/v1/chat/completions", json=body(max_tokens=2), timeout=30)  # a used connection
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{service_url}/v1/chat/completions", json=body(max_tokens=1900, ignore_eos=True), timeout=0.3)
    assert eventually(lambda: departures() == before + 1, 5)
    assert eventually(idle(scrape), 5)


def test_every_reply_has_one_request_id(service_url: str) -> None:
    chat = f"{service_url}/v1/chat/completions"
    mine = {"x-request-id": "mine"}
    replies = [
        httpx.get(f"{service_url}/health", headers=mine),
        httpx.get(f"{service_url}/nowhere", headers=mine),
        httpx.post(chat, json=body(max_tokens=0), headers=mine),
        httpx.post(chat, json=body(max_tokens=2), headers=mine),
        httpx.post(chat, json=body(max_tokens=2, stream=True), headers=mine),
    ]
    assert [reply.status_code for reply in replies] == [200, 404, 400, 200, 200]
    assert [reply.headers.get_list("x-request-id") for reply in replies] == [["mine"]] * 5
    assert len(httpx.get(f"{service_url}/health").headers.get_list("x-request-id")) == 1


def test_clients_that_connect_and_vanish_leave_the_pool_whole(
    service_url: str, config: ServeConfig, scrape: Callable[[], Scrape]
) -> None:
    payload = json.dumps(body(max_tokens=900, ignore_eos=True, stream=True)).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    ).encode()
    total = scrape().total("ridgewalk_kv_blocks")
    for number in range(500):
        with socket.create_connection((config.host, config.port)) as client:
            client.sendall(head + payload[: len(payload) if number % 4 else number % len(payload)])
            if number % 5 == 0:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # leave with a reset
    assert eventually(idle(scrape), 60)
    assert scrape().total("ridgewalk_kv_blocks") == total
    assert httpx.post(f"{service_url}/v1/chat/completions", json=body(), timeout=30).status_code == 200


def test_torch_is_loaded_in_ranks_only(service_url: str) -> None:
    ranks, others = [], []
    for process in psutil.Process().children(recursive=True):
        try:
            name, maps = " ".join(process.cmdline()), Path(f"/proc/{process.pid}/maps").read_text()
        except (psutil.Error, OSError):
            continue
        if "ray::" in name:
            (ranks if "libtorch" in maps else others).append(name)
    assert len(ranks) == 2
    assert all("RankActor" in name for name in ranks)
    assert any("EngineReplica" in name or MODEL in name for name in others)
    assert any("Ingress" in name for name in others)


def test_metrics_of_the_whole_service_come_in_one_scrape(scrape: Callable[[], Scrape]) -> None:
    now = scrape()
    assert now.total("ridgewalk_kv_blocks", model_name=MODEL, placement="TP2", replica="0") == 1024
    assert now.total("ridgewalk_scrape_missing_replicas") == 0
    assert now.total("ridgewalk_scrape_missing_ingresses") == 0


def test_a_request_that_does_not_fit_names_its_field(service_url: str) -> None:
    reply = httpx.post(f"{service_url}/v1/chat/completions", json=body(max_tokens=100_000), timeout=30)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "max_tokens"
    assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_a_stream_outlives_a_reload_of_haproxy(
    service_url: str, config: ServeConfig, scrape: Callable[[], Scrape]
) -> None:
    """A second ingress is added while a stream runs: HAProxy reloads and the stream goes on."""
    from ray import serve

    from ridgewalk.app import build_application, resolve

    async def run() -> int:
        async with aiohttp.ClientSession() as session:
            started = asyncio.Event()
            fields = {"max_tokens": 900, "ignore_eos": True}
            streaming = asyncio.create_task(
                stream_completion(
                    session,
                    f"{service_url}/v1/chat/completions",
                    body(**fields),
                    lambda text, is_reasoning: started.set(),
                )
            )
            await started.wait()
            grown = config.model_copy(update={"ingress_replicas": 2})
            application = build_application(grown, resolve(grown))
            await asyncio.to_thread(serve.run, application, name=config.app_name, route_prefix="/")
            return (await streaming).completion_tokens

    assert asyncio.run(run()) == 900
    status = serve.status().applications[config.app_name]
    assert status.deployments["Ingress"].replica_states == {"RUNNING": 2}

    # All processes were exchanged, and Serve's ranks of the new ones need not be the first. The old ones are leaving.
    assert eventually(lambda: both_ingresses_answer(scrape()))
    assert asyncio.run(scrapes_under_load(service_url)) > 100  # histograms, of both ingresses and the replica
    assert eventually(idle(scrape))
    first, *others = [scrape() for _ in range(6)]
    assert all(counters_of(other) == counters_of(first) for other in others)


def test_a_killed_rank_is_replaced_and_its_stream_continues(service_url: str, scrape: Callable[[], Scrape]) -> None:
    """The only replica loses a rank in mid-stream: the client sees a pause, then the rest, nothing twice."""
    fields = {"max_tokens": 400, "ignore_eos": True}
    whole = httpx.post(f"{service_url}/v1/chat/completions", json=body(**fields, return_token_ids=True), timeout=60)
    ranks = [p for p in psutil.Process().children(recursive=True) if "RankActor" in " ".join(p.cmdline())]

    async def run() -> list[int]:
        tokens: list[int] = []
        timeout = aiohttp.ClientTimeout(total=120)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(
                f"{service_url}/v1/chat/completions", json=body(**fields, return_token_ids=True, stream=True)
            ) as reply,
        ):
            killed = False
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk
                    tokens += [t for choice in chunk["choices"] for t in choice.get("token_ids") or []]
                if len(tokens) >= 20 and not killed:
                    killed = True
                    ranks[-1].kill()
        return tokens

    tokens = asyncio.run(run())
    assert len(tokens) == 400
    assert tokens[:20] == whole.json()["choices"][0]["token_ids"][:20]
    assert eventually(idle(scrape), 30)
