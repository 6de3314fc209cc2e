"""Whether Triton's kernels work on this machine: they are used only after they have shown the reference's results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ridgewalk.kernels.block_scales import Fp8Linear, block_linear
from ridgewalk.kernels.kernel_set import DrawRules, HeadLayout
from ridgewalk.kernels.latent_kernels import LatentLayout
from ridgewalk.kernels.torch_kernels import TorchKernels

logger = logging.getLogger(__name__)

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
"""What Triton's kernels computed, and what the reference did."""

WIDTH = 320
"""Of the rows that norms, gates and draws are tried on."""

LONGEST = 700
"""Keys of the decode step that attention is tried on: several programs share them."""


def probe_triton(
    heads: HeadLayout | LatentLayout,
    dtype: torch.dtype,
    block_size: int,
    device: torch.device,
    fp8_linear: Fp8Linear = block_linear,
) -> TorchKernels:
    """`TritonKernels` if they compute on this machine what the reference does, for heads of this shape, else those.

    Triton comes with torch for CUDA. It compiles a kernel when it is first called, for which it needs a C compiler and
    Python's header files.
    """
    try:
        from ridgewalk.kernels.cuda_kernels import TritonKernels  # CPU ranks have no Triton, others may lack it

        if _agree(TritonKernels(), heads, dtype, block_size, device):
            return TritonKernels(fp8_linear)
        reason = "their results differ from the reference's"
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    logger.warning("Triton's kernels are not used, steps will take several times as long: %s", reason)
    return TorchKernels(fp8_linear)


def _agree(
    kernels: TorchKernels, heads: HeadLayout | LatentLayout, dtype: torch.dtype, block_size: int, device: torch.device
) -> bool:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    both = (kernels, TorchKernels())
    pairs = [*_layers(both, normal), _drawn(both, normal)]
    if isinstance(heads, HeadLayout):
        pairs += [*_rotation(both, normal, heads, block_size), *_attention(both, normal, heads, block_size)]
    else:
        pairs += _latent_attention(both, normal, heads, block_size)
    return all(_close(ours, theirs) for ours, theirs in pairs)


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if not theirs.is_floating_point():  # tokens
        return torch.equal(ours, theirs)
    return torch.allclose(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)


def _layers(both: tuple[TorchKernels, TorchKernels], normal: Callable[..., torch.Tensor]) -> Pairs:
    x, residual, weight = normal(3, WIDTH), normal(3, WIDTH), normal(WIDTH)
    sums = [residual.clone() for _ in both]
    added = [k.add_rms_norm(x, total, weight, 1e-6) for k, total in zip(both, sums, strict=True)]
    return [
        _pair(k.rms_norm(x, weight, 1e-6) for k in both),
        _pair(k.silu_and_mul(torch.cat((x, residual), dim=1)) for k in both),
        _pair(added),
        _pair(sums),
    ]


def _drawn(
    both: tuple[TorchKernels, TorchKernels], normal: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each rule by itself and together, at places all along the distribution: a cut in the wrong place shows."""
    count = 5
    temperature, top_k = torch.tensor([1.0, 0.7, 1.0, 1.0, 0.0]), torch.tensor([20, 0, 9, 0, 0])
    top_p = torch.tensor([1.0, 0.9, 0.8, 1.0, 1.0], dtype=torch.float64)
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.05, 0.0], dtype=torch.float64)
    fields = (field.repeat_interleave(count) for field in (temperature, top_k, top_p, min_p))
    uniform = (torch.arange(count, dtype=torch.float64).repeat(len(top_k)) + 0.43) / count
    logits = 2 * normal(len(top_k), WIDTH).repeat_interleave(count, dim=0)
    rules = DrawRules(*fields, uniform)
    return _pair(k.draw(logits, rules) for k in both)


def _rotation(
    both: tuple[TorchKernels, TorchKernels], normal: Callable[..., torch.Tensor], heads: HeadLayout, block_size: int
) -> Pairs:
    qkv = normal(2, heads.qkv_size)
    norms = (normal(heads.head_dim), normal(heads.head_dim))
    angles = torch.arange(4 * heads.head_dim // 2, device=qkv.device).view(4, -1).float()
    positions = torch.tensor([1, 3], device=qkv.device)
    slots = torch.tensor([block_size, 0], device=qkv.device)
    shape = (2, block_size, heads.num_kv_heads, heads.head_dim)
    results = []
    for k in both:
        caches = (qkv.new_zeros(shape), qkv.new_zeros(shape))
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
        query = k.rotate_and_cache(qkv.clone(), heads, norms, 1e-6, positions, cos_sin, *caches, slots)
        results.append((query, *caches))
    return list(zip(*results, strict=True))


def _attention(
    both: tuple[TorchKernels, TorchKernels], normal: Callable[..., torch.Tensor], heads: HeadLayout, block_size: int
) -> Pairs:
    batch = _batch(block_size, normal(1).device)
    keys, values = (normal(batch.num_blocks, block_size, heads.num_kv_heads, heads.head_dim) for _ in range(2))
    query = normal(4, heads.num_heads, heads.head_dim)
    options = {"scale": heads.head_dim**-0.5, "seqused_k": batch.used, "block_table": batch.table}
    return [_pair(k.attention(query, keys, values, batch.starts, 3, LONGEST, **options) for k in both)]


def _latent_attention(
    both: tuple[TorchKernels, TorchKernels], normal: Callable[..., torch.Tensor], heads: LatentLayout, block_size: int
) -> Pairs:
    batch = _batch(block_size, normal(1).device)
    cache, query = (
        normal(batch.num_blocks, block_size, heads.latent_dim),
        normal(4, heads.num_heads, heads.latent_dim),
    )
    options = {"scale": heads.latent_dim**-0.5, "seqused_k": batch.used, "block_table": batch.table}
    return [
        _pair(
            k.latent_attention(query, cache, batch.starts, 3, LONGEST, value_dim=heads.value_dim, **options)
            for k in both
        )
    ]


@dataclass(frozen=True)
class _Batch:
    num_blocks: int
    starts: torch.Tensor
    used: torch.Tensor
    table: torch.Tensor


def _batch(block_size: int, device: torch.device) -> _Batch:
    """A prefill of three tokens beside a decode step over so many keys that several programs share them."""
    width = -(-LONGEST // block_size)
    order = torch.randperm(2 * width, generator=torch.Generator().manual_seed(1))
    return _Batch(
        2 * width,
        torch.tensor([0, 3, 4], dtype=torch.int32, device=device),
        torch.tensor([block_size + 3, LONGEST], dtype=torch.int32, device=device),
        order.view(2, width).to(device, torch.int32),
    )


def _pair(results: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    ours, theirs = results
    return ours, theirs
