"""ModelSpec reads Hugging Face configs and refuses what is not built."""

from __future__ import annotations

import json

import pytest

from ridgewalk.placement.mesh import Mesh
from ridgewalk.placement.model_spec import ModelSpec, UnsupportedModelError
from tests.placement.hub_configs import LLAMA_31_8B, QWEN3_0_6B


def test_reads_qwen3():
    spec = ModelSpec.from_config(QWEN3_0_6B)
    assert (spec.head_dim, spec.qk_norm, spec.qkv_bias, spec.tie_word_embeddings) == (128, True, False, True)
    assert spec.rope.theta == 1e6
    assert spec.eos_token_ids == (151645,)
    assert spec.num_parameters == 596_049_920  # as published
    assert spec.kv_bytes_per_token(Mesh(), "bfloat16") == 2 * 28 * 8 * 128 * 2


def test_reads_llama3_with_rope_scaling():
    spec = ModelSpec.from_config(LLAMA_31_8B)
    assert spec.head_dim == 128
    assert spec.num_parameters == 8_030_261_248  # as published
    assert (spec.rope.rope_type, spec.rope.factor, spec.rope.original_max_position_embeddings) == ("llama3", 8.0, 8192)
    assert spec.eos_token_ids == (128001, 128008, 128009)
    assert spec.kv_bytes_per_token(Mesh(), "bfloat16") == 131072


def test_old_and_new_rope_fields_read_alike():
    new = {key: value for key, value in LLAMA_31_8B.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**LLAMA_31_8B["rope_scaling"], "rope_theta": 500000.0}
    assert ModelSpec.from_config(new) == ModelSpec.from_config(LLAMA_31_8B)


def test_qwen2_has_qkv_bias_only():
    spec = ModelSpec.from_config({**QWEN3_0_6B, "architectures": ["Qwen2ForCausalLM"], "head_dim": None})
    assert (spec.qkv_bias, spec.o_bias, spec.qk_norm, spec.head_dim) == (True, False, False, 64)


def test_kv_heads_are_repeated_beyond_their_number():
    spec = ModelSpec.from_config(QWEN3_0_6B)
    assert spec.num_kv_heads_per_rank(4) == 2
    assert spec.num_kv_heads_per_rank(16) == 1
    assert spec.kv_bytes_per_token(Mesh(tp=16), "bfloat16") == spec.kv_bytes_per_token(Mesh(tp=8), "bfloat16")


def test_flops_grow_with_context():
    spec = ModelSpec.from_config(LLAMA_31_8B)
    matrices = spec.num_parameters - spec.vocab_size * spec.hidden_size - (2 * 32 + 1) * 4096
    assert spec.flops_per_token() == 2 * matrices
    assert spec.flops_per_token(1000) - spec.flops_per_token() == 4 * 32 * 4096 * 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None, "model_type": None}, "`architectures` is missing"),
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel is not supported \(supported: Llama"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding_window of this mistral config"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "needs the field 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "needs a factor over 0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number from 0 on, got '2'"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": None}},
            "needs the field 'low_freq_factor'",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 8, "beta_fast": [1]}}, "beta_fast must be a number"),
        ({"rope_theta": True}, "rope_theta must be a number from 0 on, got True"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number from 0 on, got '1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "hidden_size must be a positive whole number"),
        ({"torch_dtype": "int8"}, "dtype 'int8'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized with 'gptq' are not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}}, "e4m3"),
    ],
)
def test_refuses_what_is_not_built(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        ModelSpec.from_config({**QWEN3_0_6B, **changes})


def test_window_that_is_off_is_fine():
    ModelSpec.from_config({**QWEN3_0_6B, "use_sliding_window": False, "sliding_window": 4096})
    ModelSpec.from_config({**QWEN3_0_6B, "architectures": ["MistralForCausalLM"], "sliding_window": None})


def test_folder_adds_the_generation_configs_stop_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_0_6B))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    assert ModelSpec.from_folder(tmp_path).eos_token_ids == (151645, 151643)


def test_folder_without_config_is_an_error(tmp_path):
    with pytest.raises(UnsupportedModelError, match="no readable config"):
        ModelSpec.from_folder(tmp_path)


def test_null_means_what_a_missing_float_does():
    fields = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
    null = ModelSpec.from_config({**QWEN3_0_6B, **dict.fromkeys(fields)})
    assert null == ModelSpec.from_config({key: value for key, value in QWEN3_0_6B.items() if key not in fields})
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    optional = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    assert ModelSpec.from_config({**QWEN3_0_6B, "rope_scaling": {**yarn, **dict.fromkeys(optional)}}) == (
        ModelSpec.from_config({**QWEN3_0_6B, "rope_scaling": yarn})
    )
