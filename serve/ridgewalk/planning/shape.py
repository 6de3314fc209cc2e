"""Placements by name: one shape, or two side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ridgewalk.placement.mesh import Mesh, placement_name

_SHAPE = re.compile(r"(?:(\d+)X)?(?:DP(\d+)X?)?(?:PP(\d+)X?)?(?:TP(\d+)X?)?(?:EP(\d+))?")


class ShapeError(ValueError):
    """A name is no placement's; the message says what one looks like."""


@dataclass(frozen=True)
class Shape:
    """So many replicas of one mesh."""

    replicas: int
    mesh: Mesh

    @property
    def name(self) -> str:
        """As ``DP4xTP2``."""
        return placement_name(self.replicas, self.mesh)

    @property
    def num_devices(self) -> int:
        """Devices that it takes."""
        return self.replicas * self.mesh.world_size


@dataclass(frozen=True)
class Placement:
    """Shapes of one model, side by side; usually one."""

    shapes: tuple[Shape, ...]

    @property
    def name(self) -> str:
        """As ``TP8`` or ``DP2+TP2``."""
        return "+".join(shape.name for shape in self.shapes)

    @property
    def num_devices(self) -> int:
        """Devices that it takes."""
        return sum(shape.num_devices for shape in self.shapes)


def parse_placement(name: str) -> Placement:
    """The placement of a name like ``TP8``, ``DP4xTP2``, ``PP2xTP4``, ``DP8xEP8``, ``2xDP2xEP2`` or ``DP2+TP2``.

    Raises:
        ShapeError: it is none.
    """
    return Placement(tuple(_parse_shape(part.strip(), name) for part in name.upper().split("+")))


def _parse_shape(text: str, name: str) -> Shape:
    match = re.fullmatch(
        r"(?:([1-9]\d*)X)?(?:DP([1-9]\d*)X?)?(?:PP([1-9]\d*)X?)?(?:TP([1-9]\d*)X?)?(?:EP([1-9]\d*))?", text
    )
    if match is None or not any(match.groups()[1:]) or text.endswith("X") or "0" in match.groups():
        raise ShapeError(
            f"{name!r} is no placement; write it as TP8, DP4xTP2, PP2xTP4, DP8xEP8 or, two shapes side by side, DP4+TP4"
        )
    copies, dp, pp, tp = (int(group or 1) for group in match.groups()[:4])
    if match[5] is None:
        return Shape(copies * dp, Mesh(tp, pp))
    if int(match[5]) != dp * tp:
        raise ShapeError(f"{name!r}: experts are spread over dp x tp = {dp * tp} ranks, so it is EP{dp * tp}")
    return Shape(copies, Mesh(tp, pp, dp, expert_parallel=True))


def enumerate_placements(num_devices: int, devices_per_node: int, sparse: bool) -> list[Placement]:
    """All placements that use every device: replicas of equal meshes, and halves of two different tensor parallelisms.

    Tensor parallelism stays within a node: across nodes every layer would wait for the slower link twice.
    """
    placements = [Placement((shape,)) for shape in _shapes(num_devices, devices_per_node, sparse)]
    if num_devices % 2 == 0:
        halves = [shape for shape in _shapes(num_devices // 2, devices_per_node, sparse=False) if shape.mesh.pp == 1]
        placements += [Placement((first, second)) for at, first in enumerate(halves) for second in halves[at + 1 :]]
    return placements


def _shapes(num_devices: int, devices_per_node: int, sparse: bool) -> list[Shape]:
    shapes = []
    for world in _divisors(num_devices):
        for tp in _divisors(world):
            if tp > devices_per_node:
                continue
            for pp in _divisors(world // tp):
                dp = world // tp // pp
                if dp == 1:
                    shapes.append(Shape(num_devices // world, Mesh(tp, pp)))
                if sparse and dp * tp > 1:
                    shapes.append(Shape(num_devices // world, Mesh(tp, pp, dp, expert_parallel=True)))
    return shapes


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
