"""Overheads of a step: what real steps take beyond the terms of the cost model, divided by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from ridgewalk.calibration.engine_probe import StepPoint, small_shape
from ridgewalk.calibration.figures import Overheads
from ridgewalk.least_squares import non_negative_solution
from ridgewalk.placement.cost_model import CostModel, GroupLoad
from ridgewalk.placement.hardware import HardwareSpec
from ridgewalk.placement.model_spec import ModelSpec

COLLECTIVES_PER_LAYER = 2
"""Of a tensor-parallel layer (all-reduces) and of an expert-parallel one whose attention is not split (all-to-alls)."""


def fit_overheads(points: Sequence[StepPoint], hardware: HardwareSpec) -> Overheads:
    """What is left of the steps of small dense models is a sum over steps, sequences and layers.

    Args:
        points: at least two numbers of layers and two of sequences, of replicas of one rank.
        hardware: as one of their ranks has it, without overheads.
    """
    columns = np.array([[1.0, point.num_sequences, point.task.num_layers] for point in points])
    left = np.array([point.seconds - predicted_s(point, hardware) for point in points])
    return Overheads(*non_negative_solution(columns.T @ columns, columns.T @ left).tolist())


def left_per_layer_s(points: Sequence[StepPoint], hardware: HardwareSpec) -> float:
    """What a layer of these steps takes beyond all that ``hardware`` has for it. Seconds, not negative."""
    return max(0.0, fmean((point.seconds - predicted_s(point, hardware)) / point.task.num_layers for point in points))


def fit_wait_s(points: Sequence[StepPoint], hardware: HardwareSpec) -> float:
    """What a collective takes longer in a step than alone: its ranks do not come at the same time.

    Args:
        points: of one replica of several ranks.
        hardware: as these have it, with overheads.
    """
    return left_per_layer_s(points, hardware) / COLLECTIVES_PER_LAYER


def predicted_s(point: StepPoint, hardware: HardwareSpec) -> float:
    """What the cost model knows of such a step of a replica."""
    task, sequences = point.task, point.num_sequences
    spec = ModelSpec.from_config({**small_shape(task), "dtype": "bfloat16"})
    read = sequences * point.context
    cost = CostModel(spec, task.mesh, hardware)
    (stage,) = cost.stage_times([GroupLoad(sequences, sequences, read, read)] * task.mesh.dp)
    return cost.host_s(sequences * task.mesh.dp) + stage.total
