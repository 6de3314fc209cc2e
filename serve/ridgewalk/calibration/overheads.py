"""Overheads of a step: what real steps take beyond the cost model's terms, divided by least squares."""

from __future__ import annotations

from collections.abc import Sequence

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
        points: at least two numbers of layers and two of sequences.
        hardware: as one of ``num_ranks`` ranks has it, without overheads.
        num_ranks: tensor-parallel, that the steps ran on.
    """
    columns = [[1.0, point.num_sequences, point.num_layers] for point in points]
    left = [point.seconds - predicted_s(point, hardware, num_ranks) for point in points]
    found, *_ = np.linalg.lstsq(np.array(columns), np.array(left), rcond=None)
    return Overheads(*(max(0.0, float(seconds)) for seconds in found))


def predicted_s(point: StepPoint, hardware: HardwareSpec, num_ranks: int) -> float:
    """What the cost model knows of such a step."""
    spec = ModelSpec.from_config({**small_shape(point.num_layers, num_ranks), "dtype": "bfloat16"})
    read = point.num_sequences * point.context
    (stage,) = CostModel(spec, Mesh(tp=num_ranks), hardware).stage_times(
        [GroupLoad(point.num_sequences, point.num_sequences, read, read)]
    )
    return stage.total
