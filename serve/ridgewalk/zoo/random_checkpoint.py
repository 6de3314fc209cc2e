"""Checkpoints with random weights and a real model's shape, for benchmarks and tests that need no sense in the output.

The folders are standard Hugging Face ones, as transformers loads them. Weights are normal(0, 0.02) and follow from
the seed and the tensor's name; norms are one.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgewalk.zoo import zoo_path

if TYPE_CHECKING:
    import torch

STD = 0.02

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": STD,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
}

_HALF_K = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16000,
}

#: config.json of each shape, but for the dtype and the token ids.
SHAPES: dict[str, dict[str, Any]] = {
    # Qwen3-0.6B's own numbers.
    "q06b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "q50m": {**_QWEN3, **_HALF_K},
    "moe": {
        **_QWEN3,
        **_HALF_K,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    },
}


def make_random_checkpoint(
    like: str,
    directory: Path | str,
    seed: int = 0,
    dtype: str = "bfloat16",
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a checkpoint shaped like `like` (a key of `SHAPES`) into `directory`, which is created.

    `on_progress(done, total)` is called after each tensor, in parameters.
    Raises ValueError for an unknown shape or dtype, and for a directory that holds a model.
    """
    if like not in SHAPES:
        raise ValueError(f"unknown shape {like!r}; there are: {', '.join(sorted(SHAPES))}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"unknown dtype {dtype!r}; there are: bfloat16, float16, float32")
    if (Path(directory) / "config.json").exists():
        raise ValueError(f"{directory} holds a model already; remove it or name another directory")
    return write_checkpoint(SHAPES[like], Path(directory), seed, dtype, on_progress)


def write_checkpoint(
    shape: dict[str, Any],
    directory: Path,
    seed: int,
    dtype: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """As `make_random_checkpoint`, for any config of the qwen3 and qwen3_moe types."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    token_ids = _write_tokenizer(directory, shape["vocab_size"], shape["max_position_embeddings"])
    rope = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
    config = {**shape, **token_ids, "dtype": dtype, "rope_parameters": rope}
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {**token_ids, "do_sample": False})
    shapes = dict(tensor_shapes(shape))
    total, done, tensors = sum(map(_size, shapes.values())), 0, {}
    for name, size in shapes.items():
        tensors[name] = _random_tensor(name, size, seed, dtype)
        done += _size(size)
        if on_progress:
            on_progress(done, total)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner only
    return directory


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a qwen3 or qwen3_moe checkpoint."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}.self_attn.q_norm.weight", (head,)
        yield f"{prefix}.self_attn.k_norm.weight", (head,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if experts := config.get("num_experts"):
            yield f"{prefix}.mlp.gate.weight", (experts, hidden)
            for expert in range(experts):
                yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        else:
            yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _random_tensor(name: str, shape: tuple[int, ...], seed: int, dtype: str) -> torch.Tensor:
    """The tensor's own generator makes it independent of the others and of their order."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    if len(shape) == 1:
        return torch.ones(shape, dtype=kind)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, STD, generator=generator).to(kind)


def _write_tokenizer(directory: Path, vocab_size: int, max_length: int) -> dict[str, int]:
    """Write the demo tokenizer with filler words up to `vocab_size`, so that every id decodes to text.

    The fillers are entries of the BPE vocabulary that no merge leads to: 150,000 added tokens would make loading slow.
    Returns the ids of the end of a turn and of padding, as config.json names them.
    """
    demo = zoo_path("demo-dense")
    tokenizer = json.loads((demo / "tokenizer.json").read_text())
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    # tokenizers numbers added tokens after the vocabulary, fillers and all, unless the vocabulary has them too.
    vocab.update(added)
    used = len(vocab)
    if vocab_size < used:
        raise ValueError(f"vocab_size {vocab_size} is smaller than the tokenizer's {used}")
    vocab.update({f"\u0120w{i}": i for i in range(used, vocab_size)})  # U+0120 is how byte-level BPE writes a space
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    shutil.copyfile(demo / "chat_template.jinja", directory / "chat_template.jinja")
    config = json.loads((demo / "tokenizer_config.json").read_text())
    _write_json(directory / "tokenizer_config.json", {**config, "model_max_length": max_length})
    return {"eos_token_id": added[config["eos_token"]], "pad_token_id": added[config["pad_token"]]}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
