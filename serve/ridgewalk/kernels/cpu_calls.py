"""Calling the compiled kernels: argument types of ctypes, and codes of dtypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of dtypes in calls to the C++ kernels."""

LANES = 16
"""Width of a vector in the C++ kernels: attention wants sizes that are a multiple of it."""

POINTER, INT, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


def declare(function: Callable, arguments: list) -> Callable:
    """Give a function of the library its argument types; it returns nothing."""
    function.argtypes = arguments
    function.restype = None
    return function


def address(tensor: torch.Tensor | None) -> int | None:
    """Of a tensor's data; None of none."""
    return None if tensor is None else tensor.data_ptr()
