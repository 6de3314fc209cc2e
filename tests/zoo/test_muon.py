"""The stacked Muon: each matrix of a stack is stepped as torch's own Muon steps it alone."""

from __future__ import annotations

import pytest
import torch

from ridgewalk.zoo.muon import StackedMuon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 40, 24), (1, 32, 32)])
def test_a_stack_is_stepped_as_torch_steps_its_matrices(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(shape))
    before = stack.detach().clone()
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in before]
    ours = StackedMuon([stack], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(alone, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        stack.grad = torch.randn(shape)
        for matrix, grad in zip(alone, stack.grad, strict=True):
            matrix.grad = grad.clone()
        ours.step()
        theirs.step()
    expected = torch.stack([matrix.detach() for matrix in alone])
    moved = (expected - before).abs().mean()
    assert (stack - expected).abs().mean() < 0.02 * moved  # both work in bfloat16


def test_the_update_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(4, 16, 48) * 100).float())
    assert values.min() > 0.4
    assert values.max() < 1.4


def test_single_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="three dimensions"):
        StackedMuon([torch.nn.Parameter(torch.zeros(4, 4))], lr=0.1)
