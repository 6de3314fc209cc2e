"""The KV cache of a rank's pipeline stage: one paged cache a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ridgewalk.placement.model_spec import ModelSpec


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, each ``[num_blocks, block_size, num_kv_heads, head_dim]``."""

    key: torch.Tensor
    value: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that belongs to a block, by block."""
        return self.key, self.value

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.key.nbytes + self.value.nbytes


@dataclass(frozen=True)
class LatentCache:
    """Normalised latent and rotated rope key of one MLA layer: ``[num_blocks, block_size, latent_dim]``."""

    latent: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that belongs to a block, by block."""
        return (self.latent,)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.latent.nbytes


def make_cache(
    spec: ModelSpec, tp: int, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> LayerCache | LatentCache:
    """A zeroed cache of one layer on one of ``tp`` ranks; block ids are ``0 <= id < num_blocks``."""
    if spec.mla is not None:
        return LatentCache(torch.zeros((num_blocks, block_size, spec.mla.latent_dim), dtype=dtype, device=device))
    shape = (num_blocks, block_size, spec.num_kv_heads_per_rank(tp), spec.head_dim)
    return LayerCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))
