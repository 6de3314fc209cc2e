"""Nothing a client chooses becomes a label value."""

from __future__ import annotations

import asyncio
from urllib.parse import quote

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgewalk.api.app import build_app
from ridgewalk.metrics.catalogue import FINISH_REASONS
from ridgewalk.metrics.exposition import merge
from ridgewalk.metrics.ingress_metrics import IngressMetrics
from ridgewalk.metrics.snapshot import decode
from tests.api.conftest import make_model
from tests.api.fake_backend import FakeBackend
from tests.metrics.builders import samples

MODEL = make_model()
METRICS = IngressMetrics("0", ["tiny"])  # one for all examples: what each adds would stay

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
bodies = st.fixed_dictionaries(
    {"model": st.sampled_from(["tiny"]) | texts, "max_tokens": st.integers(-1, 6)},
    optional={"user": texts, "stop": texts, "stream": st.booleans(), "n": st.integers(0, 2), "seed": st.integers()},
)
prompts = st.sampled_from(["/v1/completions", "/v1/chat/completions"])


async def send(url: str, body: dict[str, object], request_id: str) -> None:
    content = {"prompt": "Hi"} if url.endswith("/v1/completions") else {"messages": [{"role": "user", "content": "Hi"}]}
    application = build_app(FakeBackend({"tiny": MODEL}), observer=METRICS)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://t") as client:
        await client.post(url, json=content | body, headers={"x-request-id": quote(request_id)})


@settings(max_examples=60, deadline=None)
@given(prompts | texts.map(lambda text: "/" + quote(text)), bodies, texts)
def test_strings_of_clients_never_become_label_values(url: str, body: dict[str, object], request_id: str) -> None:
    asyncio.run(send(url, body, request_id))
    text = merge([decode(METRICS.snapshot())])
    found: dict[str, set[str]] = {}
    for _, labels in samples(text):
        for name, value in labels:
            found.setdefault(name, set()).add(value)
    assert found.pop("le")
    assert found.pop("version")
    assert found.pop("status", set()) <= {"400", "404", "405"}
    assert found == {
        "model_name": {"tiny", ""} if b'model_name=""' in text else {"tiny"},
        "ingress": {"0"},
        "endpoint": {"completions", "chat_completions"},
        "finished_reason": found["finished_reason"] & set(FINISH_REASONS),
    }
