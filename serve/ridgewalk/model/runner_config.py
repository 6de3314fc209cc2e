"""What a rank process is told to run. Plain types only: it travels as msgpack. No torch is imported here."""

from __future__ import annotations

import msgspec

from ridgewalk.placement.mesh import Mesh


class RunnerConfig(msgspec.Struct, frozen=True):
    """One rank of one replica."""

    model: str  # folder with config.json and safetensors
    dtype: str  # bfloat16 | float16 | float32: of weights, KV cache and arithmetic
    device: str  # cpu | cuda | cuda:N
    rank: int  # flat rank in the mesh
    tp: int = 1
    pp: int = 1
    dp: int = 1
    expert_parallel: bool = False
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096
    num_threads: int = 0  # of a CPU rank; 0 leaves torch's default
    init_method: str = ""  # tcp://host:port or file:///path, where ranks meet; not read by a mesh of one rank
    tokens_broadcast: bool = False  # the scheduler sends placeholders: all tp ranks must learn the tokens (pp=1)
    timeout_s: float = 600.0  # a collective that waits longer for its peers raises
    expert_map: list[list[list[int]]] | None = None  # `ExpertMap.layers`, of expert-parallel ranks; None: uniform
    keeps_fp8: bool = False  # weights of an FP8 checkpoint stay in FP8 where they consist of whole blocks

    @property
    def mesh(self) -> Mesh:
        """The replica's mesh."""
        return Mesh(tp=self.tp, pp=self.pp, dp=self.dp, expert_parallel=self.expert_parallel)
