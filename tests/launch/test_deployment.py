"""What a deployment that does not come up says."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ridgewalk.config import parse_config
from ridgewalk.launch import deployment


def test_proxies_that_never_get_ready_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object, **options: object) -> None:
        raise TimeoutError("Proxies not available after 60s.")

    monkeypatch.setattr("ray.serve.run", run)
    monkeypatch.setattr("ridgewalk.app.build_application", lambda config, models: None)
    monkeypatch.setattr(deployment, "_deployment_problem", lambda app_name: None)
    config = parse_config({"models": [{"model": "x"}]})
    with pytest.raises(deployment.ServiceError, match="Proxies not available"):
        deployment.deploy(config, [], Console(file=io.StringIO()))
