"""Whether a model can be sharded over a mesh, and what to change when it cannot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ridgewalk.placement.mesh import Mesh

if TYPE_CHECKING:
    from ridgewalk.placement.model_spec import ModelSpec


def mesh_problem(spec: ModelSpec, mesh: Mesh, num_redundant_experts: int = 0) -> str | None:
    """What does not divide or fit, in one sentence with the remedy; None: the mesh works."""
    return (
        _parallelism_problem(spec, mesh, num_redundant_experts)
        or _tp_problem(spec, mesh)
        or _expert_problem(spec, mesh, num_redundant_experts)
    )


def _parallelism_problem(spec: ModelSpec, mesh: Mesh, num_redundant_experts: int) -> str | None:
    if mesh.pp > spec.num_layers:
        return f"pipeline_parallel_size (-pp) {mesh.pp} is more than the {spec.num_layers} layers; lower -pp"
    if spec.moe is None and mesh.expert_parallel:
        return (
            f"{spec.architecture} is dense here: it has no experts to run expert-parallel; "
            "drop --enable-expert-parallel"
        )
    if spec.moe is None and mesh.dp > 1:
        return (
            f"in-replica data parallelism (dp={mesh.dp}) needs an expert-parallel model; "
            f"run {mesh.dp} replicas of {spec.architecture} instead"
        )
    if mesh.dp > 1 and not mesh.expert_parallel:
        return (
            f"in-replica data parallelism (dp={mesh.dp}) needs expert parallelism; "
            f"add --enable-expert-parallel or run {mesh.dp} replicas"
        )
    if num_redundant_experts < 0 or (num_redundant_experts and not mesh.expert_parallel):
        return (
            f"num_redundant_experts {num_redundant_experts} needs expert parallelism; "
            "set it to 0 or add --enable-expert-parallel"
        )
    return None


def _tp_problem(spec: ModelSpec, mesh: Mesh) -> str | None:
    problem = _sharding_problem(spec, mesh.tp, mesh.expert_parallel)
    if problem is None:
        return None
    sizes = range(1, spec.num_heads + 1)
    fitting = _list(tp for tp in sizes if _sharding_problem(spec, tp, mesh.expert_parallel) is None)
    return f"tensor_parallel_size (-tp) {mesh.tp} {problem}; choose one of {fitting}"


def _sharding_problem(spec: ModelSpec, tp: int, expert_parallel: bool) -> str | None:
    moe = spec.moe
    if spec.num_heads % tp:
        return f"does not divide the {spec.num_heads} attention heads"
    if spec.mla is None and spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        return f"and the {spec.num_kv_heads} KV heads do not divide one another"
    if (moe is None or len(moe.sparse_layers) < spec.num_layers) and spec.intermediate_size % tp:
        return f"does not divide the intermediate size {spec.intermediate_size}"
    if moe and moe.shared_intermediate_size % tp:
        return f"does not divide the shared experts' intermediate size {moe.shared_intermediate_size}"
    if moe and not expert_parallel and moe.intermediate_size % tp:
        return f"does not divide the experts' intermediate size {moe.intermediate_size}"
    return None


def _expert_problem(spec: ModelSpec, mesh: Mesh, num_redundant_experts: int) -> str | None:
    if spec.moe is None or not mesh.expert_parallel:
        return None
    ep, experts = mesh.dp * mesh.tp, spec.moe.num_experts
    if experts % ep:
        sizes = _list(size for size in range(1, experts + 1) if experts % size == 0)
        return f"{experts} experts cannot be divided over dp x tp = {ep} ranks; choose dp x tp among {sizes}"
    most = experts * (ep - 1)
    if num_redundant_experts % ep or num_redundant_experts > most:
        return (
            f"num_redundant_experts {num_redundant_experts} must be a multiple of dp x tp = {ep} "
            f"and at most {most}, which puts every expert on every rank"
        )
    return None


def _list(sizes: Iterable[int]) -> str:
    return ", ".join(str(size) for size in sizes)
