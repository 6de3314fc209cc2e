"""Rotary frequencies equal transformers'."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ridgewalk.model.rope import inverse_frequencies, rope_table
from ridgewalk.placement.rope_spec import RopeSpec
from tests.model.checkpoints import COMMON, LINEAR_ROPE, LLAMA3_ROPE, YARN_ROPE

KINDS = {
    "linear": LINEAR_ROPE,
    "llama3": LLAMA3_ROPE,
    "yarn": YARN_ROPE,
    "yarn-explicit": {**YARN_ROPE, "attention_factor": 0.8, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-mscale": {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn-untruncated": {**YARN_ROPE, "truncate": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_equal_transformers(kind):
    config = LlamaConfig(**COMMON, rope_parameters=dict(KINDS[kind]))
    expected, factor = ROPE_INIT_FUNCTIONS[KINDS[kind]["rope_type"]](config)
    rope = RopeSpec.from_config({"rope_parameters": KINDS[kind]}, COMMON["max_position_embeddings"])
    assert torch.equal(inverse_frequencies(rope, 16), expected)
    assert rope.attention_factor == pytest.approx(factor)
    table = rope_table(rope, 16, 10, torch.device("cpu"))
    assert torch.allclose(table[3, :8], (3 * expected).cos() * factor)
