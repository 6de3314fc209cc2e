"""A step that ranks are computing."""

from __future__ import annotations

from dataclasses import dataclass

from ridgewalk.engine.request import Request


@dataclass(eq=False)
class OpenStep:
    """What the scheduler needs of a step in flight; by attention group."""

    step_id: int
    rows: list[list[tuple[Request, bool]]]  # request, and whether the step samples for it
    sizes: list[int]  # sequences sampled for that have not ended

    def leave(self, request: Request) -> None:
        """The request ended from outside: what is sampled for it counts no more."""
        rows = self.rows[request.group]
        self.sizes[request.group] -= len([row for row in rows if row[0] is request and row[1]])
