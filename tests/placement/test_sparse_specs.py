"""ModelSpec of mixture-of-experts models and of latent attention."""

from __future__ import annotations

import pytest

from ridgewalk.placement.model_spec import ModelSpec, UnsupportedModelError
from ridgewalk.placement.moe_spec import MoESpec
from tests.placement.hub_configs import DEEPSEEK_R1, DEEPSEEK_V2, DEEPSEEK_V2_LITE, MIXTRAL_8X7B, QWEN3_30B_A3B

EXPERTS_OF_R1 = MoESpec(
    num_experts=256,
    top_k=8,
    intermediate_size=2048,
    sparse_layers=tuple(range(3, 61)),
    shared_intermediate_size=2048,
    scoring="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    num_groups=8,
    topk_groups=4,
    group_score="top2",
    correction_bias=True,
    names="deepseek",
)


def without(config, *fields):
    return {key: value for key, value in config.items() if key not in fields}


@pytest.mark.parametrize(
    ("config", "parameters", "active"),
    [
        (MIXTRAL_8X7B, 46_702_792_704, 12.9e9),
        (QWEN3_30B_A3B, 30_532_122_624, 3.3e9),
        (DEEPSEEK_V2_LITE, 15_706_484_224, 2.7e9),
        (DEEPSEEK_V2, 235_741_434_880, 21e9),
        (DEEPSEEK_R1, 671_026_419_200, 37e9),  # with the routers' biases, without the layer for two-token prediction
    ],
)
def test_parameters_are_the_published_ones(config, parameters, active):
    spec = ModelSpec.from_config(config)
    assert spec.num_parameters == parameters
    assert spec.active_parameters == pytest.approx(active, rel=0.02)


def test_reads_mixtral():
    spec = ModelSpec.from_config(MIXTRAL_8X7B)
    assert spec.moe == MoESpec(8, 2, 14336, tuple(range(32)), norm_topk_prob=True, names="mixtral")
    assert (spec.mla, spec.fp8_block, spec.head_dim, spec.rms_norm_eps) == (None, None, 128, 1e-5)


def test_reads_qwen3_moe():
    spec = ModelSpec.from_config(QWEN3_30B_A3B)
    assert spec.moe == MoESpec(128, 8, 768, tuple(range(48)), norm_topk_prob=True, names="qwen3_moe")
    assert (spec.qk_norm, spec.head_dim, spec.num_kv_heads, spec.intermediate_size) == (True, 128, 4, 6144)


def test_qwen3_moe_names_its_sparse_layers_by_step_and_exception():
    config = {**QWEN3_30B_A3B, "num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    spec = ModelSpec.from_config(config)
    assert spec.moe.sparse_layers == (1, 5, 7)
    assert [spec.is_sparse(layer) for layer in range(4)] == [False, True, False, False]
    assert ModelSpec.from_config({**config, "mlp_only_layers": list(range(8))}).moe is None


def test_reads_r1():
    spec = ModelSpec.from_config(DEEPSEEK_R1)
    assert spec.moe == EXPERTS_OF_R1
    mla = spec.mla
    assert (mla.q_lora_rank, mla.kv_lora_rank, mla.qk_head_dim, mla.v_head_dim) == (1536, 512, 192, 128)
    assert (mla.latent_dim, mla.rope_interleave, mla.norm_eps) == (576, True, 1e-6)
    assert (spec.num_layers, spec.head_dim, spec.num_kv_heads, spec.fp8_block) == (61, 64, 128, (128, 128))
    assert spec.rope.attention_factor == 1.0
    assert mla.softmax_scale == pytest.approx(192**-0.5 * 1.3688879454**2)  # 0.1 ln 40 + 1, squared


def test_reads_v2_lite_without_query_latent():
    spec = ModelSpec.from_config(DEEPSEEK_V2_LITE)
    assert spec.mla.q_lora_rank == 0
    assert spec.mla.softmax_scale == pytest.approx(192**-0.5 * 1.26080378**2)  # 0.0707 ln 40 + 1, squared
    assert spec.moe == MoESpec(64, 6, 1408, tuple(range(1, 27)), 2816, norm_topk_prob=False, names="deepseek")


def test_v2_limits_groups_by_their_best_expert_and_scales():
    moe = ModelSpec.from_config(DEEPSEEK_V2).moe
    assert (moe.num_groups, moe.topk_groups, moe.group_score, moe.scoring) == (8, 3, "max", "softmax")
    assert (moe.routed_scaling_factor, moe.norm_topk_prob, moe.correction_bias) == (16.0, False, False)
    assert moe.shared_intermediate_size == 2 * 1536


def test_groups_do_not_count_for_greedy_v2():
    moe = ModelSpec.from_config({**DEEPSEEK_V2, "topk_method": "greedy"}).moe
    assert (moe.num_groups, moe.topk_groups) == (1, 1)


def test_rope_without_scaling_leaves_the_softmax_scale_alone():
    spec = ModelSpec.from_config({**DEEPSEEK_R1, "rope_scaling": None})
    assert spec.mla.softmax_scale == 192**-0.5
    plain_yarn = {**DEEPSEEK_R1["rope_scaling"], "mscale_all_dim": 0}
    assert ModelSpec.from_config({**DEEPSEEK_R1, "rope_scaling": plain_yarn}).mla.softmax_scale == 192**-0.5


@pytest.mark.parametrize("config", [DEEPSEEK_V2_LITE, DEEPSEEK_R1])
def test_old_and_new_rope_fields_read_alike(config):
    new = without(config, "rope_theta", "rope_scaling")
    new["rope_parameters"] = {**config["rope_scaling"], "rope_theta": 10000, "rope_type": "yarn"}
    assert ModelSpec.from_config(new) == ModelSpec.from_config(config)


def test_sparse_layers_may_come_at_a_frequency():
    config = {**DEEPSEEK_R1, "num_hidden_layers": 10, "moe_layer_freq": 2}
    assert ModelSpec.from_config(config).moe.sparse_layers == (4, 6, 8)


def test_a_deepseek_model_may_have_no_sparse_layer():
    spec = ModelSpec.from_config({**DEEPSEEK_R1, "num_hidden_layers": 2})
    assert spec.moe is None
    assert spec.active_parameters == spec.num_parameters


def test_flops_count_the_experts_that_a_token_passes():
    spec = ModelSpec.from_config(DEEPSEEK_R1)
    looked_up = spec.vocab_size * spec.hidden_size
    norms = 61 * (2 * 7168 + 1536 + 512) + 7168
    biases = 58 * 256
    assert spec.flops_per_token() == 2 * (spec.active_parameters - looked_up - norms - biases)
    per_position = 61 * 128 * 2 * (576 + 512)
    assert spec.flops_per_token(1000) - spec.flops_per_token() == 1000 * per_position


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (MIXTRAL_8X7B, {"sliding_window": 4096}, "sliding_window of this mixtral config"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "MixtralForCausalLM: num_experts_per_tok must be 1 to 8"),
        (QWEN3_30B_A3B, {"moe_intermediate_size": None}, "moe_intermediate_size must be a positive whole number"),
        (DEEPSEEK_R1, {"topk_method": "greedy"}, "topk_method 'greedy' is not supported"),
        (DEEPSEEK_R1, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
        (DEEPSEEK_R1, {"attention_bias": True}, "attention_bias"),
        (DEEPSEEK_R1, {"kv_lora_rank": 0}, "kv_lora_rank must be a positive"),
        (DEEPSEEK_R1, {"n_group": 7}, "n_group 7 must divide the 256 experts"),
        (DEEPSEEK_R1, {"n_group": 64, "topk_group": 1}, "topk_group 1 leaves fewer experts"),
        (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob"),
        (DEEPSEEK_V2, {"q_lora_rank": -1}, "q_lora_rank must be a whole number from 0 on"),
    ],
)
def test_refuses_what_is_not_built(config, changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        ModelSpec.from_config({**config, **changes})


def test_a_scaling_factor_of_null_is_the_familys_own_and_no_other_word_is_one():
    for config, expected in ((DEEPSEEK_R1, 2.5), (DEEPSEEK_V2, 1.0)):
        moe = ModelSpec.from_config({**config, "routed_scaling_factor": None}).moe
        assert moe is not None
        assert moe.routed_scaling_factor == expected
    with pytest.raises(UnsupportedModelError, match="routed_scaling_factor must be a number from 0 on, got 'big'"):
        ModelSpec.from_config({**DEEPSEEK_R1, "routed_scaling_factor": "big"})
