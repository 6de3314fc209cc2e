"""Which kernels a rank runs."""

from __future__ import annotations

import ctypes

import torch

from ridgewalk.kernels.block_scales import block_linear
from ridgewalk.kernels.cpu_kernels import CpuKernels
from ridgewalk.kernels.cuda_fp8 import probe_fp8_linear
from ridgewalk.kernels.kernel_set import HeadLayout, KernelSet
from ridgewalk.kernels.latent_kernels import LatentLayout
from ridgewalk.kernels.probe_triton import probe_triton
from ridgewalk.kernels.torch_kernels import TorchKernels


def select_kernels(
    device: torch.device,
    library: ctypes.CDLL | None,
    num_threads: int,
    heads: HeadLayout | LatentLayout | None,
    dtype: torch.dtype,
    block_size: int,
    fp8_block: tuple[int, int] | None = None,
) -> KernelSet:
    """The fastest kernels that work for a model on a device.

    Args:
        device: of the rank.
        library: that of `ridgewalk.kernels.build.load_library`, or None.
        num_threads: of a CPU rank.
        heads: of the rank's shard; on CPUs nothing depends on them.
        dtype: of activations and KV cache.
        block_size: of the KV cache, in tokens.
        fp8_block: rows and columns of a block of the weights that are kept in FP8; None: none are.
    """
    if device.type == "cuda":
        assert heads is not None
        fp8_linear = block_linear if fp8_block is None else probe_fp8_linear(fp8_block, dtype, device)
        return probe_triton(heads, dtype, block_size, device, fp8_linear)
    return TorchKernels() if library is None else CpuKernels(library, num_threads)
