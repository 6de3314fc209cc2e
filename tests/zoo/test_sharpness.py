"""The bound of the attention's logits holds, and clipping brings a sharp head back to the limit, and it alone."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from ridgewalk.zoo import zoo_path
from ridgewalk.zoo.sharpness import SharpnessMeter, attentions_of, clip
from ridgewalk.zoo.train import RECIPES, build_model

IDS = torch.arange(60).reshape(2, 30)
REAL = torch.ones_like(IDS, dtype=torch.bool)


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return build_model(RECIPES["demo-moe"], Tokenizer.from_file(str(zoo_path("demo-dense") / "tokenizer.json"))).eval()


def _bounds(model: PreTrainedModel, real: torch.Tensor = REAL) -> torch.Tensor:
    meter = SharpnessMeter(model)
    with torch.inference_mode():
        model(IDS, use_cache=False)
    bounds = meter.bounds(real).clone()
    meter.close()
    return bounds


def _largest_logits(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """[layers, heads], from the queries and keys that the attention really gets."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: object) -> torch.Tensor:
        seen.append((query @ key.mT * kwargs["scale"]).abs().amax(dim=(0, 2, 3)))
        return attend(query, key, value, **kwargs)

    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        model(IDS, use_cache=False)
    return torch.stack(seen)


def test_no_logit_exceeds_the_bound(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds, logits = _bounds(model), _largest_logits(model, monkeypatch)
    assert bounds.shape == logits.shape == (4, 8)
    assert (logits <= bounds * 1.001).all()
    assert (logits > bounds / 10).all()


def test_clipping_scales_every_logit_of_the_sharp_head_and_of_no_other(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, bounds = _largest_logits(model, monkeypatch), _bounds(model)
    limited = torch.full((4, 8), 1.0)
    limited[0, 3] = 48.0  # as if this head had been found at twice the limit
    clip(attentions_of(model), limited, limit=24.0)
    after = _largest_logits(model, monkeypatch)
    expected = before[0].clone()
    expected[3] /= 2
    assert torch.allclose(after[0], expected, rtol=1e-4)
    assert _bounds(model)[0, 3] < bounds[0, 3]


def test_padding_does_not_count(model: PreTrainedModel) -> None:
    real = REAL.clone()
    real[:, 1:] = False
    assert (_bounds(model, real) < _bounds(model)).any()
    assert (_bounds(model, real) <= _bounds(model)).all()


def test_a_dense_model_has_nothing_to_clip() -> None:
    tokenizer = Tokenizer.from_file(str(zoo_path("demo-dense") / "tokenizer.json"))
    assert attentions_of(build_model(RECIPES["demo-dense"], tokenizer)) == []
