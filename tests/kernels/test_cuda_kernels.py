"""Choosing attention on CUDA: a backend is used only after it has shown the reference's results."""

from __future__ import annotations

import pytest
import torch

from ridgewalk.kernels import cuda_kernels
from ridgewalk.kernels.cuda_kernels import VarlenKernels, probe_varlen
from ridgewalk.kernels.kernel_set import HeadLayout
from ridgewalk.kernels.torch_kernels import TorchKernels

HEADS = HeadLayout(4, 2, 64)
CPU = torch.device("cpu")


@pytest.fixture
def registered(monkeypatch):
    """One implementation is registered and can be activated."""
    monkeypatch.setattr(cuda_kernels, "list_flash_attention_impls", lambda: ["FA3"])
    monkeypatch.setattr(cuda_kernels, "activate_flash_attention_impl", lambda name: None)


def attention_of(transform):
    """A stand-in for `varlen_attn` that returns a changed reference result."""

    def stand_in(query, keys, values, starts, starts_k, max_q, max_k, *, scale, seqused_k, block_table, **options):
        assert starts_k is None
        assert options == {"window_size": (-1, 0), "enable_gqa": True}
        reference = TorchKernels().attention(
            query, keys, values, starts, max_q, max_k, scale=scale, seqused_k=seqused_k, block_table=block_table
        )
        return transform(reference)

    return stand_in


def test_backend_that_agrees_is_used(monkeypatch, registered):
    monkeypatch.setattr(cuda_kernels, "varlen_attn", attention_of(lambda x: x))
    assert isinstance(probe_varlen(HEADS, torch.bfloat16, 16, CPU), VarlenKernels)


def test_backend_that_differs_is_not_used(monkeypatch, registered):
    monkeypatch.setattr(cuda_kernels, "varlen_attn", attention_of(lambda x: x + 1))
    assert probe_varlen(HEADS, torch.bfloat16, 16, CPU).name == "torch"


def test_backend_that_fails_is_not_used(monkeypatch, registered):
    def fail(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(cuda_kernels, "varlen_attn", fail)
    assert probe_varlen(HEADS, torch.bfloat16, 16, CPU).name == "torch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reference_is_right_on_cuda():
    on_cuda = probe_varlen(HEADS, torch.bfloat16, 16, torch.device("cuda"))
    assert cuda_kernels._agrees(on_cuda, HEADS, torch.bfloat16, 16, torch.device("cuda"))
