"""Clients that people use, unmodified: both majors of `openai`, and `litellm`, each installed on its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.service.conftest import MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CACHE = Path(sys.prefix) / "clients"

OPENAI = """
    import openai
    client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
    assert openai.__version__.startswith(MAJOR), openai.__version__
    question = [{"role": "user", "content": "What is 27 + 58?"}]
    reply = client.chat.completions.create(model=MODEL, messages=question, temperature=0)
    assert reply.choices[0].message.content.strip() == "85", reply
    assert reply.choices[0].message.reasoning_content
    parts = client.chat.completions.create(model=MODEL, messages=question, temperature=0, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices).strip() == "85"
    text = client.completions.create(model=MODEL, prompt="1 + 1 =", max_tokens=4, temperature=0)
    assert text.usage.completion_tokens <= 4
    assert [m.id for m in client.models.list()] == [MODEL]
"""
LITELLM = """
    import litellm
    question = [{"role": "user", "content": "What is 27 + 58?"}]
    ask = dict(model=f"openai/{MODEL}", api_base=URL, api_key="none", messages=question, temperature=0)
    reply = litellm.completion(**ask)
    assert reply.choices[0].message.content.strip() == "85", reply
    assert reply.choices[0].message.reasoning_content
    parts = list(litellm.completion(**ask, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices).strip() == "85"
"""


def installed(requirement: str) -> Path:
    """A folder with the client and what it needs, made once per virtual environment."""
    folder = CACHE / requirement.replace("<", "_").replace(">", "_").replace("=", "").replace(",", "_")
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        uv = [
            str(Path(sys.executable).with_name("uv")),
            "pip",
            "install",
            "--quiet",
            "--python",
            sys.executable,
        ]  # a fifth of pip's time
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
        for installer in [uv, pip] if Path(uv[0]).exists() else [pip]:
            command = [*installer, "--target", str(partial), requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        if done.returncode:
            pytest.skip(f"{requirement} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        partial.rename(folder)
    return folder


@pytest.mark.parametrize(
    ("requirement", "major", "script"),
    [("openai>=2,<3", "2.", OPENAI), ("openai>=3,<4", "3.", OPENAI), ("litellm<2", "", LITELLM)],
)
def test_client_works_streaming_and_not(service_url: str, requirement: str, major: str, script: str) -> None:
    header = f"URL, MODEL, MAJOR = {service_url + '/v1'!r}, {MODEL!r}, {major!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", header + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(installed(requirement))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
