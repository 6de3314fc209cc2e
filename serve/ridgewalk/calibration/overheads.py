"""Overheads of a step: what real steps take beyond the cost model's terms, divided by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from ridgewalk.calibration.engine_probe import StepPoint, small_shape
from ridgewalk.calibration.figures import Overheads
from ridgewalk.placement.cost_model import CostModel, GroupLoad
from ridgewalk.placement.hardware import HardwareSpec
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec


def fit_overheads(points: Sequence[StepPoint], hardware: HardwareSpec, num_ranks: int) -> Overheads:
    """What is left of the steps of small models is a sum over steps, sequences and layers.

    Args:
        points: at least two numbers of layers and two of sequences, of replicas of one rank.
        hardware: as one of ``num_ranks`` ranks has it, without overheads.
        num_ranks: on the machine, each a replica.
    """
    columns = [[1.0, point.num_sequences, point.num_layers] for point in points]
    left = [point.seconds - predicted_s(point, hardware, num_ranks, tp=1) for point in points]
    return Overheads(*_non_negative(np.array(columns), np.array(left)).tolist())


def _non_negative(columns: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Least squares; terms that would be negative are left out, so that the others do not make up for them."""
    kept = np.arange(columns.shape[1])
    while True:
        found = np.zeros(columns.shape[1])
        found[kept] = np.linalg.lstsq(columns[:, kept], left, rcond=None)[0]
        if found.min() >= 0:
            return found
        kept = np.setdiff1d(kept, found.argmin())


def fit_wait_s(points: Sequence[StepPoint], hardware: HardwareSpec, num_ranks: int) -> float:
    """What a collective takes longer in a step than alone: its ranks do not come at the same time.

    Args:
        points: of one tensor-parallel replica; a layer of a step has two all-reduces.
        hardware: as ``num_ranks`` ranks of one replica have it, with overheads.
        num_ranks: of the replica, which has the machine to itself.
    """
    left = [
        (point.seconds - predicted_s(point, hardware, num_ranks, tp=num_ranks)) / (2 * point.num_layers)
        for point in points
    ]
    return max(0.0, fmean(left))


def predicted_s(point: StepPoint, hardware: HardwareSpec, num_ranks: int, tp: int) -> float:
    """What the cost model knows of such a step of a replica, of the small model for so many ranks."""
    spec = ModelSpec.from_config({**small_shape(point.num_layers, num_ranks), "dtype": "bfloat16"})
    read = point.num_sequences * point.context
    cost = CostModel(spec, Mesh(tp=tp), hardware)
    (stage,) = cost.stage_times([GroupLoad(point.num_sequences, point.num_sequences, read, read)])
    return cost.host_s(point.num_sequences) + stage.total
