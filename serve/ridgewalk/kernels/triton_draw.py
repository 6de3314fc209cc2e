"""Drawing tokens on CUDA in Triton: a few passes over each row of logits, and no sorting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ridgewalk.kernels.kernel_set import DrawRules

BLOCK = 4096
"""Logits of a row that are looked at together."""


def draw_tokens(logits: torch.Tensor, rules: DrawRules) -> torch.Tensor:
    """See `KernelSet.draw`.

    Which tokens top-k and top-p keep is a threshold on the weight, and how many of those right at it, in the order of
    ids. Floats of one sign are ordered as their bits are, so that thresholds are found bit by bit, from the highest
    (radix select): a pass over the row weighs three candidates and settles two bits.
    """
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    top_k, top_p, min_p = rules.top_k, rules.top_p, rules.min_p
    fields = (rules.temperature, top_k.clamp(max=logits.shape[1]), top_p, min_p, rules.uniform)
    if len(logits):
        _draw[(len(logits),)](
            out,
            logits,
            *(field.to(logits.device) for field in fields),
            logits.stride(0),
            logits.shape[1],
            BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])),
            num_warps=16,
        )
    return out


@triton.jit
def _weights(row, first, vocab_size, greatest, sharpness, BLOCK: tl.constexpr):
    """Weights of some tokens, 1 for the greatest logit, and their bits; beyond the vocabulary 0 and -1."""
    token = first + tl.arange(0, BLOCK)
    logit = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    weight = tl.exp((logit - greatest) * sharpness)
    return weight, tl.where(token < vocab_size, weight.to(tl.int32, bitcast=True), -1)


@triton.jit
def _at_least(row, vocab_size, greatest, sharpness, bound, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """How many weights have at least these bits, or their sum, in FP64."""
    total = tl.full((), 0.0, tl.float64)
    for first in range(0, vocab_size, BLOCK):
        weight, bits = _weights(row, first, vocab_size, greatest, sharpness, BLOCK)
        value = tl.full([BLOCK], 1.0, tl.float32) if COUNTS else weight
        total += tl.sum(tl.where(bits >= bound, value, 0.0), 0).to(tl.float64)
    return total


@triton.jit
def _threshold(row, vocab_size, greatest, sharpness, wanted, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """The highest bits whose `_at_least` reaches ``wanted``, which that of all weights does."""
    bound = 0
    unit = 1 << 28  # no weight is over 1, whose bits are under 2^30
    while unit > 0:
        one = tl.full((), 0.0, tl.float64)
        two = tl.full((), 0.0, tl.float64)
        three = tl.full((), 0.0, tl.float64)
        for first in range(0, vocab_size, BLOCK):
            weight, bits = _weights(row, first, vocab_size, greatest, sharpness, BLOCK)
            value = tl.full([BLOCK], 1.0, tl.float32) if COUNTS else weight
            one += tl.sum(tl.where(bits >= bound + unit, value, 0.0), 0).to(tl.float64)
            two += tl.sum(tl.where(bits >= bound + 2 * unit, value, 0.0), 0).to(tl.float64)
            three += tl.sum(tl.where(bits >= bound + 3 * unit, value, 0.0), 0).to(tl.float64)
        reached = (one >= wanted).to(tl.int32) + (two >= wanted).to(tl.int32) + (three >= wanted).to(tl.int32)
        bound += unit * reached
        unit = unit // 4
    return bound


@triton.jit
def _arg_max(row, vocab_size, BLOCK: tl.constexpr):
    """The greatest logit and the first token that has it."""
    greatest = float("-inf")
    best = 0
    for first in range(0, vocab_size, BLOCK):
        token = first + tl.arange(0, BLOCK)
        logit = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        highest = tl.max(logit, 0)
        if highest > greatest:
            greatest = highest
            best = tl.min(tl.where(logit == highest, token, vocab_size), 0)
    return greatest, best


@triton.jit
def _cut(row, vocab_size, greatest, sharpness, top_k, top_p, BLOCK: tl.constexpr):
    """Bits of the lowest weight that top-k and top-p keep, and how many of exactly that weight."""
    bound = 0
    ties = vocab_size
    total = tl.full((), 0.0, tl.float64)
    if (top_k > 0) & (top_k < vocab_size):
        bound = _threshold(row, vocab_size, greatest, sharpness, top_k.to(tl.float64), True, BLOCK)
        ties = top_k - _at_least(row, vocab_size, greatest, sharpness, bound + 1, True, BLOCK).to(tl.int32)
        total = _at_least(row, vocab_size, greatest, sharpness, bound + 1, False, BLOCK)
        total += ties * bound.to(tl.float32, bitcast=True).to(tl.float64)
    else:
        total = _at_least(row, vocab_size, greatest, sharpness, 0, False, BLOCK)
    if top_p < 1:
        wanted = tl.maximum(top_p * total, 1e-30)  # of the greatest weight at least
        lowest = _threshold(row, vocab_size, greatest, sharpness, wanted, False, BLOCK)
        short = wanted - _at_least(row, vocab_size, greatest, sharpness, lowest + 1, False, BLOCK)
        weight = lowest.to(tl.float32, bitcast=True).to(tl.float64)
        # Of equals those are kept before whom the mass is not yet reached.
        needed = tl.ceil(tl.minimum(short / tl.maximum(weight, 1e-300), 2.0e9)).to(tl.int32)
        needed = tl.maximum(needed, 1)
        ties = tl.where(lowest == bound, tl.minimum(ties, needed), needed)
        bound = lowest
    return bound, ties


@triton.jit
def _kept(row, first, vocab_size, greatest, sharpness, bound, ties, seen, min_p, BLOCK: tl.constexpr):
    """Weights of the tokens that are kept, 0 of the others; and how many had the lowest weight, ``seen`` included."""
    weight, bits = _weights(row, first, vocab_size, greatest, sharpness, BLOCK)
    equal = (bits == bound).to(tl.int32)
    rank = seen + tl.cumsum(equal, 0) - equal
    keeps = (bits > bound) | ((bits == bound) & (rank < ties))
    return tl.where(keeps & (weight.to(tl.float64) >= min_p), weight, 0.0), seen + tl.sum(equal, 0)


@triton.jit
def _draw(
    out,
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """A program has a row."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    greatest, best = _arg_max(row, vocab_size, BLOCK)
    temperature = tl.load(temperatures + index)
    if (temperature <= 0) | (greatest == float("-inf")) | (greatest == float("inf")):
        tl.store(out + index, best.to(tl.int64))
        return
    sharpness = 1.0 / tl.maximum(temperature, 1e-30)
    top_k = tl.load(top_ks + index).to(tl.int32)
    bound, ties = _cut(row, vocab_size, greatest, sharpness, top_k, tl.load(top_ps + index), BLOCK)
    min_p = tl.load(min_ps + index)
    mass = tl.full((), 0.0, tl.float64)
    seen = 0
    for first in range(0, vocab_size, BLOCK):
        weight, seen = _kept(row, first, vocab_size, greatest, sharpness, bound, ties, seen, min_p, BLOCK)
        mass += tl.sum(weight, 0).to(tl.float64)

    target = tl.load(uniforms + index) * mass
    passed = tl.full((), 0.0, tl.float64)
    chosen = vocab_size
    last = best  # kept so far, for when rounding leaves no token above the target
    seen = 0
    first = 0
    while (first < vocab_size) & (chosen == vocab_size):
        token = first + tl.arange(0, BLOCK)
        weight, seen = _kept(row, first, vocab_size, greatest, sharpness, bound, ties, seen, min_p, BLOCK)
        above = (passed + tl.cumsum(weight, 0).to(tl.float64) > target) & (weight > 0)
        chosen = tl.min(tl.where(above, token, vocab_size), 0)
        last = tl.maximum(last, tl.max(tl.where(weight > 0, token, 0), 0))
        passed += tl.sum(weight, 0).to(tl.float64)
        first += BLOCK
    tl.store(out + index, tl.where(chosen == vocab_size, last, chosen).to(tl.int64))
