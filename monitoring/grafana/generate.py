"""Writes the dashboards' JSON: ``python -m monitoring.grafana.generate`` (or `make dashboards`)."""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from monitoring.grafana.board import Board
from monitoring.grafana.kv import KV
from monitoring.grafana.placements import PLACEMENTS
from monitoring.grafana.service import SERVICE
from monitoring.grafana.synchronization import SYNCHRONIZATION

BOARDS = (SERVICE, KV, SYNCHRONIZATION, PLACEMENTS)
FOLDER = Path(__file__).parent / "dashboards"


def file_of(board: Board) -> Path:
    """Where a dashboard's JSON is."""
    return FOLDER / f"{board.uid}.json"


def text_of(board: Board) -> str:
    """A dashboard's JSON."""
    return json.dumps(board.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def main() -> None:
    """Write all, and remove what is no dashboard any more."""
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        path.unlink()
    for board in BOARDS:
        file_of(board).write_text(text_of(board))
        print(file_of(board))


if __name__ == "__main__":
    main()
