"""Serve's rank of a replica, which is what metrics call it."""

from __future__ import annotations

from ray import serve


def serve_rank() -> str:
    """The rank of the replica that this process is, now: Serve may give it another while it runs."""
    return str(serve.get_replica_context().rank.rank)
