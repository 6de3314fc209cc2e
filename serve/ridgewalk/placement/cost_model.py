"""Seconds of one engine step on given hardware, as a sum of named terms.

Reading and computing overlap in a kernel, so a product takes the longer of its weights' bytes over bandwidth and its
FLOPs over rate (roofline: Williams et al. 2009), and so does attention with its KV cache; where products were measured
by rows, it takes that. Kernels and collectives follow each other, and so does the host's work unless it is scheduled
ahead. Every constant is a property of the hardware, none of a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from ridgewalk.placement import parameters
from ridgewalk.placement.collective_cost import all_gather_s, all_reduce_s, all_to_all_s, send_s
from ridgewalk.placement.fp8_weights import kept_block
from ridgewalk.placement.hardware import HardwareSpec
from ridgewalk.placement.measured_curve import MeasuredCurve
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from ridgewalk.placement.stages import stage_layers
from ridgewalk.placement.weights import DTYPE_BYTES, expert_bytes, held_bytes, stage_weights


class GroupLoad(NamedTuple):
    """What one attention group computes in one step."""

    num_tokens: float = 0.0
    num_sequences: float = 0.0
    kv_tokens: float = 0.0  # cached tokens that its sequences read, each sequence's context once
    pairs: float = 0.0  # query-key pairs: for a decoding sequence its context


class StepTime(NamedTuple):
    """Seconds of one step on a rank of one stage, by what takes them."""

    weights: float = 0.0  # reading weights; by roofline, only where that takes longer than the products with them
    products: float = 0.0  # products with weights, where they take longer; of measured ones, by how much longer
    attention: float = 0.0  # reading the KV cache, or the arithmetic of attention if that takes longer
    all_reduce: float = 0.0  # among tensor-parallel ranks
    dispatch_combine: float = 0.0  # all-to-all among expert-parallel ranks
    launch: float = 0.0  # kernels that follow each other
    send: float = 0.0  # to the next stage, and taking over from the one before
    ranks: float = 0.0  # messages to several ranks, and waiting for the last of them to begin
    straggle: float = 0.0  # waiting in collectives for the slowest of the ranks that meet there

    @property
    def total(self) -> float:
        """All of it."""
        return math.fsum(self)


@dataclass(frozen=True)
class _Stage:
    """One rank of a stage, reduced to what a step's time needs. Bytes and FLOPs."""

    num_layers: int
    num_sparse: int
    weight_bytes: float  # read by every step: all but routed experts and the embedding
    flops_per_token: float
    head_flops: float  # per sequence, on the last stage
    expert_bytes: float  # of one routed expert as this rank holds it
    slots: int  # routed experts of a layer on this rank
    expert_flops: float  # per row
    kv_bytes: float  # per token
    pair_flops: float  # per query-key pair
    is_last: bool


class CostModel:
    """Times of steps of one replica: a model on a mesh of given hardware."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, hardware: HardwareSpec) -> None:
        self.spec, self.mesh, self.hardware = spec, mesh, hardware
        self.element_bytes = DTYPE_BYTES[spec.dtype]
        self._keeps_fp8 = hardware.keeps_fp8 and kept_block(spec, True) is not None
        product_dtype = "float8" if self._keeps_fp8 else spec.dtype
        rate = hardware.flops[product_dtype] * hardware.flops_efficiency
        self._attention_rate = hardware.flops[spec.dtype] * hardware.flops_efficiency
        self._bandwidth = hardware.memory_bandwidth * hardware.bandwidth_efficiency
        self._ep = mesh.dp * mesh.tp if mesh.expert_parallel else 1
        shares, experts = hardware.product_shares.get(product_dtype, {}), hardware.expert_flops.get(product_dtype)
        self._products = ProductTimes(rate, {rows: share * rate for rows, share in shares.items()})
        self._expert_products = ProductTimes(rate, experts) if experts else None
        self._describe_attention()
        self._busiest = greatest_of_normals(self._ep)
        meeting = greatest_of_normals(max(mesh.tp, self._ep if spec.moe else 1))
        self._straggle = hardware.straggle * meeting / (greatest_of_normals(hardware.devices_per_node) or 1.0)
        self._expert_stretch = self._stretch_of_experts()
        stages = self._describe_stages()
        self._kinds = list(dict.fromkeys(stages))  # most stages of a pipeline are alike
        self._kind_of_stage = [self._kinds.index(stage) for stage in stages]

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self._kind_of_stage)

    def host_s(self, num_sequences: float) -> float:
        """The host's work on a step of so many sequences; while it lasts, the ranks have nothing to do."""
        return self.hardware.step_overhead_s + num_sequences * self.hardware.sequence_overhead_s

    def stage_times(self, groups: list[GroupLoad]) -> list[StepTime]:
        """Seconds of a step on each stage. Attention groups enter the all-to-all together: the slowest one counts."""
        times = [self._stage_time(stage, groups) for stage in self._kinds]
        return [times[kind] for kind in self._kind_of_stage]

    def _stage_time(self, stage: _Stage, groups: list[GroupLoad]) -> StepTime:
        hardware, mesh = self.hardware, self.mesh
        tokens = max(group.num_tokens for group in groups)
        reading = stage.weight_bytes / self._bandwidth
        computing = self._products.seconds(stage.flops_per_token, tokens)
        computing += self._products.seconds(stage.head_flops, max(group.num_sequences for group in groups))
        if self._products.measured:  # the memory's bandwidth is that of the dtype which reads fastest
            reading = max(reading, min(computing, self._products.seconds(stage.flops_per_token, 1.0)))
        weights, products = _by_term(reading, computing, self._products)
        if stage.num_sparse:
            times = self._expert_times(stage, sum(group.num_tokens for group in groups))
            more = _by_term(*times, self._expert_products or self._products)
            weights, products = weights + more[0], products + more[1]
        attention = max(
            max(
                group.kv_tokens * stage.kv_bytes / self._kv_bandwidth,
                group.pairs * stage.pair_flops / self._attention_rate,
            )
            for group in groups
        )
        hidden_bytes = tokens * self.spec.hidden_size * self.element_bytes
        all_reduce = dispatch = 0.0
        if mesh.tp > 1:
            one = all_reduce_s(hardware, mesh.tp, hidden_bytes)
            gathered = stage.num_sparse if mesh.expert_parallel else 0  # a rank dispatches its share of tokens
            all_reduce = (2 * stage.num_layers - gathered) * one
            all_reduce += gathered * all_gather_s(hardware, mesh.tp, hidden_bytes)
        if self._ep > 1 and self.spec.moe:
            # A token is sent once for each of its experts, as `model.dispatch` does, even where they share a rank.
            one = all_to_all_s(hardware, self._ep, hidden_bytes / mesh.tp * self.spec.moe.top_k)
            dispatch = 2 * stage.num_sparse * one
        send = hardware.stage_overhead_s if mesh.pp > 1 else 0.0
        ranks = hardware.ranks_overhead_s if mesh.world_size > 1 else 0.0
        if not stage.is_last:
            send += send_s(hardware, mesh.dp * mesh.tp, hidden_bytes / mesh.tp)
        values = tokens * self.spec.hidden_size
        launch = stage.num_layers * (hardware.layer_overhead_s + values * hardware.value_overhead_s)
        launch += stage.num_sparse * hardware.sparse_layer_overhead_s
        straggle = self._straggle * (weights + products + attention + launch)
        return StepTime(weights, products, attention, all_reduce, dispatch, launch, send, ranks, straggle)

    def _expert_times(self, stage: _Stage, tokens: float) -> tuple[float, float]:
        """Reading and computing the routed experts of all sparse layers, on the busiest rank.

        Tokens choose evenly: of E experts, T tokens with k choices each touch E (1 - (1 - k/E)^T). The busiest of n
        ranks has more experts to read and more rows than the mean: by the standard deviation (binomial, Poisson) times
        the expected maximum of n normal variables, which counts of few tokens make the most of.
        """
        moe = self.spec.moe
        assert moe is not None
        untouched = (1 - moe.top_k / moe.num_experts) ** tokens
        touched = stage.slots * (1 - untouched)
        touched = min(stage.slots, touched + self._busiest * math.sqrt(touched * untouched))
        rows = tokens * moe.top_k / self._ep
        rows += self._busiest * math.sqrt(rows)
        alike = max(1.0, touched)  # products of as many rows each
        if self._expert_products is not None:
            # One row takes what reading takes. A thread has one tile at a time: nothing else computes while it gets
            # going, and slices are slower with 16 rows as with 4.
            stretched = stage.num_sparse * self._expert_stretch
            reading = touched * self._expert_products.seconds(stage.expert_flops, 1.0)
            computing = alike * self._expert_products.seconds(stage.expert_flops, rows / alike)
            return stretched * reading, stretched * computing
        # By roofline: where the arithmetic decides, some tiles compute while others get going.
        reading = stage.num_sparse * touched * stage.expert_bytes * self._expert_stretch / self._bandwidth
        return reading, stage.num_sparse * alike * self._products.seconds(stage.expert_flops, rows / alike)

    def _describe_attention(self) -> None:
        """Rates of attention, where the hardware has measured ones: that of reading KV depends on its reuse."""
        spec, hardware, tp = self.spec, self.hardware, self.mesh.tp
        self._kv_bandwidth = self._bandwidth
        self._attention_rate = hardware.attention_flops.get(spec.dtype, self._attention_rate)
        if spec.mla is not None:
            self._attention_rate = hardware.latent_attention_flops.get(spec.dtype, self._attention_rate)
        elif measured := hardware.attention_bandwidth.get(spec.dtype):
            per_byte = MeasuredCurve.of({heads: 1 / rate for heads, rate in measured.items()})
            self._kv_bandwidth = 1 / per_byte.at(spec.num_heads_per_rank(tp) / spec.num_kv_heads_per_rank(tp))

    def _stretch_of_experts(self) -> float:
        if self.spec.moe is None:
            return 1.0
        slices = 1 if self.mesh.expert_parallel else self.mesh.tp
        inner_size = self.spec.moe.intermediate_size / slices
        return expert_stretch(self.hardware.expert_fill, self.spec.hidden_size, inner_size)

    def _describe_stages(self) -> list[_Stage]:
        spec, mesh = self.spec, self.mesh
        held = stage_weights(spec, mesh, keeps_fp8=self.hardware.keeps_fp8)
        kv_bytes = spec.kv_bytes_per_token_per_stage(mesh, spec.dtype)
        slices = 1 if mesh.expert_parallel else mesh.tp
        one_expert = expert_bytes(spec, mesh, spec.dtype, self.hardware.keeps_fp8) / slices
        slots = spec.moe.slots_per_rank(self._ep) if spec.moe else 0
        stages = []
        for layers, weights, kv in zip(stage_layers(spec, mesh.pp), held, kv_bytes, strict=True):
            is_last = layers.stop == spec.num_layers
            sparse = sum(spec.is_sparse(layer) for layer in layers)
            table = weights.vocab_rows * spec.hidden_size
            read = held_bytes(spec, weights, spec.dtype) - sparse * slots * one_expert
            read -= (weights.tables - is_last) * table * self.element_bytes
            dense = (len(layers) - sparse) * parameters.dense_parameters(spec, mesh.tp)
            shared = sparse * (parameters.shared_parameters(spec, mesh.tp) + parameters.router_parameters(spec))
            passed = len(layers) * parameters.attention_matrices(spec, mesh.tp) + dense + shared
            stages.append(
                _Stage(
                    num_layers=len(layers),
                    num_sparse=sparse,
                    weight_bytes=read,
                    flops_per_token=2.0 * passed,
                    head_flops=2.0 * table if is_last else 0.0,
                    expert_bytes=one_expert,
                    slots=slots,
                    expert_flops=2.0 * parameters.expert_parameters(spec, slices),
                    kv_bytes=kv,
                    pair_flops=float(len(layers) * self._pair_flops()),
                    is_last=is_last,
                )
            )
        return stages

    def _pair_flops(self) -> int:
        """Scores and values of one query and key, all heads of a rank, one layer: as `ModelSpec.flops_per_token`."""
        heads, mla = self.spec.num_heads_per_rank(self.mesh.tp), self.spec.mla
        return heads * (2 * (mla.latent_dim + mla.kv_lora_rank) if mla else 4 * self.spec.head_dim)


def _by_term(reading: float, computing: float, products: ProductTimes) -> tuple[float, float]:
    """`StepTime.weights` and `products`, together the longer of the two.

    By roofline it is either. Where products were measured, the time of one row is reading, which that of more includes.
    """
    if reading >= computing:
        return reading, 0.0
    return (reading, computing - reading) if products.measured else (0.0, computing)


class ProductTimes:
    """Seconds of products with weights, by the rows of each."""

    def __init__(self, rate: float, measured: Mapping[int, float]) -> None:
        """Take rates in FLOP/s: ``measured`` by rows; ``rate`` at any number of rows, where there are none."""
        self._rate = rate
        spent = {rows: rows / reached for rows, reached in measured.items()}
        self._curve = MeasuredCurve.of(spent) if spent else None

    @property
    def measured(self) -> bool:
        """Whether there are rates by rows."""
        return self._curve is not None

    def seconds(self, flops_per_row: float, rows: float) -> float:
        """Of one product, or of several that have as many rows each."""
        if not rows:
            return 0.0
        return flops_per_row * (rows / self._rate if self._curve is None else self._curve.at(rows))


def expert_stretch(fill: float, hidden_size: int, inner_size: float) -> float:
    """How much longer an expert takes because its kernels must get going, above all in narrow slices.

    Each tile of a product runs along its input columns with a few loads ahead, and computes nothing until the first has
    come: K columns take the time of K + `HardwareSpec.expert_fill`. Gate and up, two thirds of the weights, run along
    the hidden size; down runs along the intermediate size, or a rank's slice of it.
    """
    return 1 + fill / 3 * (2 / hidden_size + 1 / inner_size)


def greatest_of_normals(count: int) -> float:
    """Expected maximum of so many standard normal variables, by Blom's approximation (1958)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0
