"""Puts the parameters of all ranks of a replica together again: the contract of `shard_plan`, told backwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from ridgewalk.placement.expert_map import ExpertMap, uniform_expert_map
from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec
from tests.model.checkpoints import FP8_BLOCK

Ranks = list[dict[str, torch.Tensor]]

WHOLE = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o_bias": "self_attn.o_proj.bias",
    "q_a": "self_attn.q_a_proj.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "down_bias": "mlp.down_proj.bias",
    "router_bias": "mlp.gate.e_score_correction_bias",
}
BY_ROWS = {"q": "self_attn.q_proj", "q_b": "self_attn.q_b_proj", "kv_b": "self_attn.kv_b_proj"}
BY_COLUMNS = {"o": "self_attn.o_proj", "down": "mlp.down_proj", "shared_down": "mlp.shared_experts.down_proj"}
PAIRS = {"gate_up": "mlp", "shared_gate_up": "mlp.shared_experts"}
EXPERTS = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "deepseek": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in one file; FP8 ones multiplied with their scales."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scales, weight = tensors.pop(name), tensors[name.removesuffix("_scale_inv")].float()
        spread = scales.repeat_interleave(FP8_BLOCK[0], 0).repeat_interleave(FP8_BLOCK[1], 1)
        tensors[name.removesuffix("_scale_inv")] = weight * spread[: weight.shape[0], : weight.shape[1]]
    return tensors


def reassemble(spec: ModelSpec, mesh: Mesh, expert_map: ExpertMap | None, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The checkpoint that the ranks were loaded from; asserts that what several ranks hold is the same on all."""
    tensors: dict[str, torch.Tensor] = {}
    size = mesh.tp * mesh.dp
    for stage in range(mesh.pp):
        members = ranks[stage * size : (stage + 1) * size]
        groups = [members[start : start + mesh.tp] for start in range(0, size, mesh.tp)]
        found = [dict(_attention_group(spec, group)) for group in groups]
        for name, values in found[0].items():
            assert all(torch.equal(values, other[name]) for other in found[1:])
            assert torch.equal(tensors.setdefault(name, values), values)  # a tied embedding is on two stages
        tensors |= _experts(spec, mesh, expert_map, members)
    return tensors


def _attention_group(spec: ModelSpec, tp_ranks: Ranks) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything but the routed experts, of one stage."""
    for name in tp_ranks[0]:
        parts = [rank[name] for rank in tp_ranks]
        if name in ("embedding", "head"):
            table = torch.cat(parts)
            assert not table[spec.vocab_size :].any()
            yield {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}[name], table[: spec.vocab_size]
        elif name == "norm":
            yield "model.norm.weight", _same(parts)
        else:
            layer, short = name.removeprefix("layers.").split(".")
            for tensor, values in _layer(spec, short, parts):
                yield f"model.layers.{layer}.{tensor}", values


def _layer(spec: ModelSpec, short: str, parts: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    kind = "bias" if short.endswith("_bias") else "weight"
    stem = short.removesuffix("_bias")
    if short in WHOLE:
        yield WHOLE[short], _same(parts)
    elif short == "router":
        assert spec.moe is not None
        yield f"{EXPERTS[spec.moe.names][0]}.gate.weight", _same(parts)
    elif short in BY_ROWS:
        yield f"{BY_ROWS[short]}.weight", torch.cat(parts)
    elif short in BY_COLUMNS:
        yield f"{BY_COLUMNS[short]}.weight", torch.cat(parts, dim=1)
    elif stem in PAIRS:
        halves = [part.chunk(2) for part in parts]
        for index, tensor in enumerate(("gate_proj", "up_proj")):
            yield f"{PAIRS[stem]}.{tensor}.{kind}", torch.cat([half[index] for half in halves])
    elif stem == "qkv":
        heads = spec.num_heads // len(parts) * spec.head_dim
        yield f"self_attn.q_proj.{kind}", torch.cat([part[:heads] for part in parts])
        kv = [part[heads:].chunk(2) for part in parts]
        for index, tensor in enumerate(("k_proj", "v_proj")):
            copies = max(1, len(parts) // spec.num_kv_heads)
            groups = [kv[start : start + copies] for start in range(0, len(parts), copies)]
            values = torch.cat([_same([rank[index] for rank in group]) for group in groups])
            yield f"self_attn.{tensor}.{kind}", values
    else:
        assert short.startswith("experts_"), short


def _experts(spec: ModelSpec, mesh: Mesh, expert_map: ExpertMap | None, members: Ranks) -> dict[str, torch.Tensor]:
    """Routed experts of one stage."""
    if spec.moe is None:
        return {}
    block, gate, up, down = EXPERTS[spec.moe.names]
    held: dict[str, list[torch.Tensor]] = defaultdict(list)
    layers = [name.split(".")[1] for name in members[0] if name.endswith("experts_down")]
    for layer in layers:
        gate_up = [rank[f"layers.{layer}.experts_gate_up"] for rank in members]
        downs = [rank[f"layers.{layer}.experts_down"] for rank in members]
        if mesh.expert_parallel:
            slots = (expert_map or uniform_expert_map(spec.moe, mesh.dp * mesh.tp)).layers
            ranks = slots[spec.moe.sparse_layers.index(int(layer))]
        else:
            halves = [part.chunk(2, dim=1) for part in gate_up]
            gate_up = [torch.cat([torch.cat([half[index] for half in halves], dim=1) for index in (0, 1)], dim=1)]
            downs = [torch.cat(downs, dim=2)]
            ranks = (tuple(range(spec.moe.num_experts)),)
        for rank, experts in enumerate(ranks):
            assert len(experts) == len(gate_up[rank]) == len(downs[rank])
            for slot, expert in enumerate(experts):
                prefix = f"model.layers.{layer}.{block}.experts.{expert}"
                first, second = gate_up[rank][slot].chunk(2)
                held[f"{prefix}.{gate}.weight"].append(first)
                held[f"{prefix}.{up}.weight"].append(second)
                held[f"{prefix}.{down}.weight"].append(downs[rank][slot])
    return {name: _same(copies) for name, copies in held.items()}


def _same(copies: list[torch.Tensor]) -> torch.Tensor:
    assert all(torch.equal(copies[0], copy) for copy in copies[1:])
    return copies[0]
