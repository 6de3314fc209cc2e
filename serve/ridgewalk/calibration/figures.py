"""What is measured, as plain data: ranks send it, the hardware file is written from it."""

from __future__ import annotations

import msgspec


class KernelRates(msgspec.Struct, frozen=True):
    """Of one rank and one dtype, while all ranks of the machine do the same."""

    weight_bandwidth: float  # bytes/s of weights, read by products of one row
    product_flops: dict[int, float]  # FLOP/s by rows
    attention_bandwidth: dict[int, float]  # bytes/s of KV in decode, by query heads per KV head
    attention_flops: float  # FLOP/s of attention of prompts
    latent_attention_flops: float  # FLOP/s of decode over latents
    expert_flops: dict[int, float]  # FLOP/s of a sparse layer's experts, by rows of each
    sliced_expert_flops: dict[int, float]  # the same of experts that are split among ranks
    value_s: float  # seconds of norms, rotation and activation of a layer, for each value of a token's hidden state


class CollectiveRates(msgspec.Struct, frozen=True):
    """Of one rank in a group of all."""

    all_reduce_latency_s: float
    all_reduce_bandwidth: float  # bytes/s; an all-reduce of n bytes counts as 2 (ranks - 1) / ranks n
    all_to_all_latency_s: float
    all_to_all_bandwidth: float  # bytes/s that leave a rank
    straggle: float  # of what ranks compute between two collectives: how much longer the last takes than a rank alone


class RankFigures(msgspec.Struct, frozen=True):
    """Of one rank."""

    kernels: dict[str, KernelRates]  # by dtype
    collectives: CollectiveRates | None  # None: not measured


class Overheads(msgspec.Struct, frozen=True):
    """Seconds of a step of the whole engine that the kernels and collectives measured do not take."""

    step_s: float
    sequence_s: float  # for each sequence of the step
    layer_s: float  # for each layer
