"""Which kernels a rank runs."""

from __future__ import annotations

import ctypes

import torch

from ridgewalk.kernels.cpu_kernels import CpuKernels
from ridgewalk.kernels.cuda_kernels import probe_varlen
from ridgewalk.kernels.kernel_set import HeadLayout, KernelSet
from ridgewalk.kernels.torch_kernels import TorchKernels


def select_kernels(
    device: torch.device,
    library: ctypes.CDLL | None,
    num_threads: int,
    heads: HeadLayout | None,
    dtype: torch.dtype,
    block_size: int,
) -> KernelSet:
    """The fastest kernels that work for a model on a device.

    Args:
        device: of the rank.
        library: that of `ridgewalk.kernels.build.load_library`, or None.
        num_threads: of a CPU rank.
        heads: of the rank's shard; None where latents are cached, which `varlen_attn` is too narrow for.
        dtype: of activations and KV cache.
        block_size: of the KV cache, in tokens.
    """
    if device.type == "cuda":
        return TorchKernels() if heads is None else probe_varlen(heads, dtype, block_size, device)
    return TorchKernels() if library is None else CpuKernels(library, num_threads)
