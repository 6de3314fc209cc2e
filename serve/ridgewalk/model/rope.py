"""Rotary tables, computed in FP32 as transformers computes them (`modeling_rope_utils`)."""

from __future__ import annotations

import math

import torch

from ridgewalk.placement.rope_spec import RopeSpec


def rope_table(rope: RopeSpec, head_dim: int, max_model_len: int, device: torch.device) -> torch.Tensor:
    """FP32 ``[max_model_len, head_dim]``: for each position the cosines of head_dim / 2 angles, then their sines."""
    angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * inverse_frequencies(rope, head_dim)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.attention_factor
    return table.to(device)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions, FP32 ``[head_dim / 2]``."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "linear":
        return inv_freq / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, inv_freq)
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim)
    return inv_freq


def _llama3(rope: RopeSpec, inv_freq: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between are blended."""
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / rope.factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(between, blended, scaled)


def _yarn(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): interpolate dimensions that turn rarely, keep those that turn often."""
    original = rope.original_max_position_embeddings

    def dimension_turning(times: float) -> float:
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    kept, interpolated = 1.0 / frequencies, 1.0 / (rope.factor * frequencies)
    return interpolated * ramp + kept * (1 - ramp)
