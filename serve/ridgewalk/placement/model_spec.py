"""`ModelSpec`: the one description of a model. The planner computes with it and the ranks build the model from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.rope_spec import RopeSpec

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one element, by the names that configs use."""


class UnsupportedModelError(ValueError):
    """Ridgewalk does not serve this model, or not on this mesh; the message says why in a sentence."""


@dataclass(frozen=True)
class Family:
    """What the config of an architecture leaves unsaid."""

    name: str
    qkv_bias: bool = False  # q, k and v have a bias whatever the config says
    qk_norm: bool = False  # RMS norm over each head of q and k
    attention_bias_field: bool = False  # `attention_bias` and `mlp_bias` are read
    window_switch: bool = False  # `sliding_window` counts only with `use_sliding_window`


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", attention_bias_field=True),
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, window_switch=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, attention_bias_field=True, window_switch=True),
}
"""Architectures that are built, by the name in `architectures` of a Hugging Face config."""


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a dense decoder with grouped-query attention."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeSpec
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"  # of the checkpoint
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read a Hugging Face ``config.json`` (already parsed).

        Raises:
            UnsupportedModelError: the architecture or a feature of it is not built, or a field is missing.
        """
        family_key = _architecture(config)
        family = FAMILIES[family_key]
        _refuse_sliding_window(config, family)
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise UnsupportedModelError(
                f"{family_key} with hidden_act {activation!r} is not supported (only 'silu' is)"
            )
        if config.get("quantization_config"):
            raise UnsupportedModelError(
                f"quantized checkpoints of {family_key} are not supported; use an unquantized one"
            )
        hidden_size = _whole(config, "hidden_size")
        num_heads = _whole(config, "num_attention_heads")
        max_position_embeddings = _whole(config, "max_position_embeddings")
        try:
            rope = RopeSpec.from_config(config, max_position_embeddings)
        except ValueError as error:
            raise UnsupportedModelError(f"{family_key}: {error}") from error
        attention_bias = family.attention_bias_field and bool(config.get("attention_bias", False))
        return cls(
            architecture=family_key,
            vocab_size=_whole(config, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=_whole(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or hidden_size // num_heads),
            intermediate_size=_whole(config, "intermediate_size"),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=rope,
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family.name == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            dtype=_dtype(config),
            eos_token_ids=_token_ids(config.get("eos_token_id")),
            bos_token_id=config.get("bos_token_id"),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelSpec:
        """Read ``config.json`` of a model folder; the end-of-sequence tokens of ``generation_config.json`` are added.

        Raises:
            UnsupportedModelError: as `from_config`; also when the folder has no readable ``config.json``.
        """
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(f"{folder} has no readable config.json: {error}") from error
        generation = Path(folder) / "generation_config.json"
        if generation.exists():
            more = _token_ids(json.loads(generation.read_text()).get("eos_token_id"))
            known = _token_ids(config.get("eos_token_id"))
            config["eos_token_id"] = [*known, *(token for token in more if token not in known)]
        return cls.from_config(config)

    # Shapes of one rank's shard

    def num_heads_per_rank(self, tp: int) -> int:
        """Query heads of one tensor-parallel rank."""
        return self.num_heads // tp

    def num_kv_heads_per_rank(self, tp: int) -> int:
        """KV heads of one tensor-parallel rank: at least one, so that heads are repeated when ``tp > num_kv_heads``."""
        return max(1, self.num_kv_heads // tp)

    def vocab_size_per_rank(self, tp: int) -> int:
        """Rows of the embedding held by one rank; the last shard is padded when tp does not divide the vocabulary."""
        return math.ceil(self.vocab_size / tp)

    # Parameters

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied embeddings counted once."""
        return self.num_parameters_per_rank(Mesh())

    def num_parameters_per_rank(self, mesh: Mesh) -> int:
        """Parameters that one rank holds: sharded ones by its share, norms and repeated KV heads in full."""
        embeddings = self.vocab_size_per_rank(mesh.tp) * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * self._layer_parameters(mesh.tp) + self.hidden_size

    def _layer_parameters(self, tp: int) -> int:
        q_size = self.num_heads_per_rank(tp) * self.head_dim
        kv_size = self.num_kv_heads_per_rank(tp) * self.head_dim
        mlp = self.intermediate_size // tp
        matrices = self.hidden_size * (2 * q_size + 2 * kv_size + 3 * mlp)
        biases = self.qkv_bias * (q_size + 2 * kv_size) + self.o_bias * self.hidden_size
        biases += self.mlp_bias * (2 * mlp + self.hidden_size)
        norms = 2 * self.hidden_size + self.qk_norm * 2 * self.head_dim
        return matrices + biases + norms

    def weight_bytes_per_rank(self, mesh: Mesh, dtype: str) -> int:
        """Bytes of weights on one rank."""
        return self.num_parameters_per_rank(mesh) * DTYPE_BYTES[dtype]

    # KV cache and arithmetic

    def kv_bytes_per_token(self, mesh: Mesh, dtype: str) -> int:
        """Bytes of KV cache that one token takes on one rank (keys and values, all layers of the rank)."""
        return 2 * self.num_layers * self.num_kv_heads_per_rank(mesh.tp) * self.head_dim * DTYPE_BYTES[dtype]

    def flops_per_token(self, context_len: int = 0) -> int:
        """FLOPs of one token through the whole model at one context length.

        2 per weight of every matrix product (the head included, the embedding look-up not), and 4 per layer, head
        dimension and cached token for scores and values (arXiv 2001.08361, section 2.1).
        """
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * q_size + 2 * kv_size + 3 * self.intermediate_size)
        attention = 4 * self.num_layers * q_size * context_len
        return 2 * (self.num_layers * layer + self.vocab_size * self.hidden_size) + attention


def validate_mesh(spec: ModelSpec, mesh: Mesh) -> None:
    """Check that the model can be sharded over the mesh.

    Raises:
        UnsupportedModelError: one sentence naming the size that does not divide, or the parallelism that is not built.
    """
    if mesh.pp > 1:
        raise UnsupportedModelError(
            f"pipeline parallelism (pp={mesh.pp}) is not built for {spec.architecture}; use pp=1"
        )
    if mesh.dp > 1:
        raise UnsupportedModelError(
            f"in-replica data parallelism (dp={mesh.dp}) needs an expert-parallel model; "
            f"run {mesh.dp} replicas of {spec.architecture} instead"
        )
    if mesh.expert_parallel:
        raise UnsupportedModelError(f"{spec.architecture} is dense: it has no experts to run expert-parallel")
    tp = mesh.tp
    fitting = ", ".join(str(size) for size in range(1, spec.num_heads + 1) if _divides(spec, size))
    remedy = f"choose one of {fitting}"
    if spec.num_heads % tp:
        problem = f"does not divide the {spec.num_heads} attention heads"
    elif spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        problem = f"and the {spec.num_kv_heads} KV heads do not divide one another"
    elif spec.intermediate_size % tp:
        problem = f"does not divide the intermediate size {spec.intermediate_size}"
    else:
        return
    raise UnsupportedModelError(f"tensor_parallel_size (-tp) {tp} {problem}; {remedy}")


def _divides(spec: ModelSpec, tp: int) -> bool:
    kv_heads_fit = spec.num_kv_heads % tp == 0 or tp % spec.num_kv_heads == 0
    return spec.num_heads % tp == 0 and kv_heads_fit and spec.intermediate_size % tp == 0


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [config.get("model_type", "none named")]
    if names[0] not in FAMILIES:
        raise UnsupportedModelError(f"architecture {names[0]} is not supported (supported: {', '.join(FAMILIES)})")
    return str(names[0])


def _refuse_sliding_window(config: Mapping[str, Any], family: Family) -> None:
    window = config.get("sliding_window")
    if family.window_switch:
        active = bool(config.get("use_sliding_window", False)) and window is not None
        field = "use_sliding_window"
    else:
        active = family.name == "mistral" and window is not None
        field = "sliding_window"
    active = active or "sliding_attention" in (config.get("layer_types") or ())
    if active:
        raise UnsupportedModelError(
            f"sliding-window attention is not supported, but {field} of this {family.name} config turns it on"
        )


def _whole(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(f"config.json: {field} must be a positive whole number, got {value!r}")
    return value


def _dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise UnsupportedModelError(f"dtype {name!r} is not supported (supported: {', '.join(DTYPE_BYTES)})")
    return name


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)
