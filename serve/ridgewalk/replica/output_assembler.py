"""From what each attention group of a replica sampled, as it comes, to the outputs of whole steps, in order."""

from __future__ import annotations

from collections import deque

from ridgewalk.engine.step import GroupOutput, StepOutput


class OutputAssembler:
    """Collects one `GroupOutput` per step and group; a step is complete when all its groups are."""

    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self._order: deque[int] = deque()  # ids of the steps in flight
        self._parts: dict[int, dict[int, GroupOutput]] = {}  # by step id, by group

    def expect(self, step_id: int) -> None:
        """A step was submitted, after all those before it."""
        self._order.append(step_id)
        self._parts[step_id] = {}

    def add(self, step_id: int, group: int, output: GroupOutput) -> None:
        """A group is done with a step.

        Raises:
            RuntimeError: the step is not in flight, or there is no such group, or it was done already.
        """
        parts = self._parts.get(step_id)
        if parts is None or group in parts or not 0 <= group < self._num_groups:
            raise RuntimeError(f"attention group {group} sent an output of step {step_id} that nobody waits for")
        parts[group] = output

    def take(self) -> list[StepOutput]:
        """Steps that are complete and that no incomplete one precedes, oldest first."""
        outputs = []
        while self._order and len(self._parts[self._order[0]]) == self._num_groups:
            step_id = self._order.popleft()
            parts = self._parts.pop(step_id)
            outputs.append(StepOutput(step_id, [parts[group] for group in range(self._num_groups)]))
        return outputs
