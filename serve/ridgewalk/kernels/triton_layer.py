"""Norms, rotation and gates on CUDA in Triton: one kernel for what torch's operations take several passes for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ridgewalk.kernels.kernel_set import HeadLayout

GATE_BLOCK = 1024


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `KernelSet.rms_norm`."""
    out = torch.empty_like(x)
    _launch_norm(out, x, x, weight, eps, adds=False)
    return out


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `KernelSet.add_rms_norm`."""
    out = torch.empty_like(x)
    _launch_norm(out, x, residual, weight, eps, adds=True)
    return out


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `KernelSet.silu_and_mul`."""
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty((len(gate_up), width))
    if len(gate_up):
        _silu_and_mul[(len(gate_up), triton.cdiv(width, GATE_BLOCK))](
            out, gate_up, gate_up.stride(0), WIDTH=width, BLOCK=GATE_BLOCK
        )
    return out


def rotate_and_cache(
    qkv: torch.Tensor,
    heads: HeadLayout,
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """See `KernelSet.rotate_and_cache`; a slot below zero is not written."""
    query = qkv.new_empty((len(qkv), heads.num_heads, heads.head_dim))
    q_norm, k_norm = norm_weights if norm_weights is not None else (qkv, qkv)
    _rotate_and_cache[(len(qkv), heads.num_heads + 2 * heads.num_kv_heads)](
        query,
        key_cache,
        value_cache,
        qkv,
        q_norm,
        k_norm,
        positions,
        cos_sin,
        slot_mapping,
        eps,
        qkv.stride(0),
        NUM_HEADS=heads.num_heads,
        NUM_KV_HEADS=heads.num_kv_heads,
        HALF=heads.head_dim // 2,
        BLOCK=triton.next_power_of_2(heads.head_dim // 2),
        NORM=norm_weights is not None,
        num_warps=1,
    )
    return query


def _launch_norm(
    out: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, adds: bool
) -> None:
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    if len(x):
        _rms_norm[(len(x),)](
            out,
            x,
            residual,
            weight,
            eps,
            x.stride(0),
            residual.stride(0),
            WIDTH=width,
            BLOCK=block,
            ADDS=adds,
            num_warps=min(max(block // 512, 1), 16),
        )


@triton.jit
def _scaled(wide, weight, mask, dtype: tl.constexpr):
    """Rounded as Hugging Face's norms are: once before the product with the weight, once after it."""
    factor = tl.load(weight, mask=mask, other=0.0).to(tl.float32)
    return (wide.to(dtype).to(tl.float32) * factor).to(dtype)


@triton.jit
def _rms_norm(
    out,
    x,
    residual,
    weight,
    eps,
    x_stride,
    residual_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    values = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if ADDS:
        before = tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
        values = (values.to(tl.float32) + before.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(residual + row * residual_stride + column, values, mask=mask)
    wide = values.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    tl.store(out + row * WIDTH + column, _scaled(wide, weight + column, mask, out.dtype.element_ty), mask=mask)


@triton.jit
def _silu_and_mul(out, gate_up, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = tl.load(gate_up + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + column, (opened * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_and_cache(
    query,
    key_cache,
    value_cache,
    qkv,
    q_norm,
    k_norm,
    positions,
    cos_sin,
    slot_mapping,
    eps,
    qkv_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    """A program has one head of a token: a query, a key or a value."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    mask = column < HALF
    source = qkv + token * qkv_stride + head * 2 * HALF + column
    first = tl.load(source, mask=mask, other=0.0)
    second = tl.load(source + HALF, mask=mask, other=0.0)
    slot = tl.load(slot_mapping + token)
    cached = tl.where(mask, slot, -1) >= 0
    if head >= NUM_HEADS + NUM_KV_HEADS:
        target = value_cache + (slot * NUM_KV_HEADS + head - NUM_HEADS - NUM_KV_HEADS) * 2 * HALF + column
        tl.store(target, first, mask=cached)
        tl.store(target + HALF, second, mask=cached)
        return
    if NORM:
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        squares = tl.sum(wide_first * wide_first, 0) + tl.sum(wide_second * wide_second, 0)
        inverse = tl.rsqrt(squares / (2 * HALF) + eps)
        norm = k_norm if head >= NUM_HEADS else q_norm
        dtype = query.dtype.element_ty
        first = _scaled(wide_first * inverse, norm + column, mask, dtype)
        second = _scaled(wide_second * inverse, norm + HALF + column, mask, dtype)
    angle = cos_sin + tl.load(positions + token) * 2 * HALF + column
    cos = tl.load(angle, mask=mask, other=0.0)
    sin = tl.load(angle + HALF, mask=mask, other=0.0)
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    turned_first = wide_first * cos - wide_second * sin
    turned_second = wide_second * cos + wide_first * sin
    if head < NUM_HEADS:
        target = query + (token * NUM_HEADS + head) * 2 * HALF + column
        present = mask
    else:
        target = key_cache + (slot * NUM_KV_HEADS + head - NUM_HEADS) * 2 * HALF + column
        present = cached
    tl.store(target, turned_first.to(query.dtype.element_ty), mask=present)
    tl.store(target + HALF, turned_second.to(query.dtype.element_ty), mask=present)
