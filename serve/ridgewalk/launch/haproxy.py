"""The program that Ray Serve runs as its HAProxy: it amends the configuration that Serve wrote, and becomes HAProxy.

Serve has no settings for what is amended here. It asks for a program by a path (RAY_SERVE_HAPROXY_BINARY_PATH), and
writes its configuration anew before each start of that program:

- clients reach HAProxy at the address that the user chose, while Serve and its replicas know the loopback address only;
- while no ingress runs, clients get a 503 in OpenAI's shape and not Serve's 404 or 500, nor its fallback proxy;
- HAProxy's own metrics and statistics, which ask for no key, listen on the loopback address;
- requests are not spliced: of a client that sent its body in a second packet, as most do, HAProxy 2.8 would not notice
  that it left before the reply began (``option abortonclose`` is mute once the kernel has moved the body).

This file runs alone, for every reload: it imports nothing but the standard library's quickest parts.
"""

from __future__ import annotations

import os
import re
import sys

SERVE_HOST = "127.0.0.1"
"""What Serve must be told as its host, for `amended` to find it."""

_MARK = "# amended by ridgewalk\n"
_FALLBACK_SERVER = re.compile(r"^[ \t]*server \S+ \S+ check backup\n", re.MULTILINE)


class UnknownConfiguration(Exception):
    """Serve's configuration is not of the form that can be amended."""


def not_ready_reply() -> str:
    """The whole HTTP reply while no ingress runs."""
    body = '{"error":{"message":"The service is not ready.","type":"server_error","param":null,"code":"not_ready"}}'
    headers = ["content-type: application/json", f"content-length: {len(body)}", "retry-after: 1"]
    return "\r\n".join(["HTTP/1.1 503 Service Unavailable", *headers, "", body])


def amended(config: str, address: str, error_file: str) -> str:
    """Serve's HAProxy configuration, as the module says. What was amended before stays as it is.

    ``address``: numeric, IPv4 or IPv6; ``::`` takes IPv4 too. ``error_file``: holds `not_ready_reply`.

    Raises:
        UnknownConfiguration: a part of it is not there.
    """
    if config.startswith(_MARK):
        return config
    clients = rf"\g<1>[{address}]\2" if ":" in address else rf"\g<1>{address}\2"
    if address == "::":
        clients += " v4v6"
    amendments = (
        ("the address of clients", r"(^frontend http_frontend\n\s+bind )127\.0\.0\.1(:\d+)$", clients, 1),
        ("its metrics port", r"(^frontend prometheus\n\s+bind ):(\d+)$", r"\g<1>127.0.0.1:\2", 1),
        ("its statistics port", r"(^listen stats\n\s+bind )\*:(\d+)$", r"\g<1>127.0.0.1:\2", 1),
        ("paths without a route", r"(^backend default_backend\n\s+http-request return status ).*$",
         r"\g<1>503 default-errorfiles", 1),
        ("the splicing of requests", r"^\s+option splice-request\n", "", 1),
        ("its own errors", r"^(\s+errorfile 50[234] ).*$", rf"\g<1>{error_file}", 3),
    )  # fmt: skip
    for what, pattern, replacement, expected in amendments:
        config, count = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        if count != expected:
            raise UnknownConfiguration(f"ridgewalk does not know how this version of Ray Serve configures {what}")
    return _MARK + _FALLBACK_SERVER.sub("", config)


def wrapper_script(python: str, haproxy: str, address: str, error_file: str) -> str:
    """The program for RAY_SERVE_HAPROXY_BINARY_PATH, which runs this file."""
    words = [python, "-I", "-S", os.path.abspath(__file__), haproxy, address, error_file]
    quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
    return f'#!/bin/sh\nexec {quoted} "$@"\n'


def main(arguments: list[str]) -> None:
    """``arguments``: HAProxy's path, the address, the error file, then what HAProxy gets."""
    haproxy, address, error_file, *rest = arguments
    path = rest[rest.index("-f") + 1]
    with open(path) as file:
        config = file.read()
    try:
        config = amended(config, address, error_file)
    except UnknownConfiguration as error:
        sys.exit(str(error))  # Serve shows it: "HAProxy crashed during startup"
    with open(path, "w") as file:
        file.write(config)
    os.execv(haproxy, [haproxy, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
