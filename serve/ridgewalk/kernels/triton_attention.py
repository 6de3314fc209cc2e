"""Paged attention on CUDA in Triton: one kernel for prefills and decode steps, plain heads and absorbed latents.

Why not torch's own `varlen_attn`: over a block table it needs FlashAttention 3 or 4, which torch does not bring, and
neither is made for latents. Triton comes with torch. Decode steps, which reasoning consists of, read the cache at
three quarters of the memory's peak; prefills of long prompts would be faster with FlashAttention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

SPLIT_KEYS = 256
"""Keys of a decoding sequence that are worth a program of their own."""

PROGRAMS = 1024
"""Few sequences are divided over so many programs: several for each multiprocessor."""

MIN_SPLITS, MAX_SPLITS = 8, 64
"""Programs that share one decoding sequence. Not fewer among many sequences, for one may be long beside short ones; and
not as many as its keys would make, for every sequence is given as many programs, and places for their results."""

MERGED_AT_ONCE = 16
"""Partial results that a program adds up in one go."""

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class _Tile:
    """What a program holds at once."""

    rows: int  # queries times heads
    keys: int
    num_warps: int
    num_stages: int


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    value_dim: int,
    scale: float,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """Causal attention over paged keys, as `KernelSet.attention`, and with latents as `LatentKernels.latent_attention`.

    The softmax is taken on the way over the keys (FlashAttention, arXiv 2205.14135). The heads that share a key-value
    head are rows of one product, and where a sequence has one query its keys are divided over programs whose results
    are merged by a second kernel (Flash-Decoding). A step that mixes prefills and decodes runs both ways, each leaving
    out the other's sequences. A sequence of no keys gets zeros: such rows pad a captured step.

    Args:
        query: ``[T, num_heads, key_dim]``.
        key_cache: ``[num_blocks, block_size, num_kv_heads, key_dim]``.
        value_cache: ``[num_blocks, block_size, num_kv_heads, value_dim]``; None: values are the beginning of keys.
        cu_seqlens_q: see `KernelSet.attention`, as for the others.
        max_seqlen_q: with 1 every sequence decodes.
        max_seqlen_k: at least the longest; as many programs as are worth its keys share a sequence at most.
        value_dim: of a head; with a value cache it is ``key_dim``.
        scale: of the scores.
        seqused_k: of each sequence.
        block_table: int32, rows contiguous.

    Returns:
        ``[T, num_heads, value_dim]``.
    """
    out = query.new_empty((*query.shape[:2], value_dim))
    if max_seqlen_q > 1:
        _prefill(out, query, key_cache, value_cache, cu_seqlens_q, scale, seqused_k, block_table)
    _decode(out, query, key_cache, value_cache, cu_seqlens_q, max_seqlen_k, scale, seqused_k, block_table)
    return out


def _prefill(
    out: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    starts: torch.Tensor,
    scale: float,
    used: torch.Tensor,
    table: torch.Tensor,
) -> None:
    group = query.shape[1] // keys.shape[2]
    tile = _prefill_tile(query.dtype, query.shape[2], _has_large_shared_memory(query.device))
    heads = min(triton.next_power_of_2(group), tile.rows)
    queries, head_blocks = tile.rows // heads, triton.cdiv(group, heads)
    # Block b of sequence i is the program `starts[i] // queries + i + b`: never fewer programs than blocks.
    programs = len(query) // queries + len(used)
    _attend[(programs, keys.shape[2] * head_blocks, 1)](
        *_pointers(out, out, query, keys, values, starts, used, table),
        scale * LOG2_E,
        len(used),
        *_strides(query, keys, values, table),
        **_constants(query, keys, values, out, heads),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        DECODE=False,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _decode(
    out: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    starts: torch.Tensor,
    max_seqlen_k: int,
    scale: float,
    used: torch.Tensor,
    table: torch.Tensor,
) -> None:
    num_heads, value_dim = out.shape[1:]
    group = num_heads // keys.shape[2]
    heads = min(triton.next_power_of_2(group), 16)
    head_blocks = keys.shape[2] * triton.cdiv(group, heads)
    splits = num_splits(len(used) * head_blocks, max_seqlen_k)
    partial = torch.empty((len(used), num_heads, splits, value_dim), dtype=torch.float32, device=query.device)
    weights = torch.empty((len(used), num_heads, splits), dtype=torch.float32, device=query.device)
    tile = _decode_tile(query.dtype, query.shape[2])
    _attend[(len(used), head_blocks, splits)](
        *_pointers(partial, weights, query, keys, values, starts, used, table),
        scale * LOG2_E,
        len(used),
        *_strides(query, keys, values, table),
        **_constants(query, keys, values, out, heads),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        DECODE=True,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    _merge[(len(used), num_heads)](
        out,
        partial,
        weights,
        starts,
        used,
        splits,
        num_heads,
        DIM=value_dim,
        BLOCK_D=_padded(value_dim),
        SPLIT=SPLIT_KEYS,
        BLOCK=MERGED_AT_ONCE,
    )


def num_splits(programs: int, max_seqlen_k: int) -> int:
    """Programs that share each decoding sequence, of which there would be ``programs`` undivided."""
    wanted = min(max(PROGRAMS // max(programs, 1), MIN_SPLITS), MAX_SPLITS)
    return max(1, min(wanted, triton.cdiv(max_seqlen_k, SPLIT_KEYS)))


def _prefill_tile(dtype: torch.dtype, key_dim: int, large: bool) -> _Tile:
    if key_dim > 256:
        return _Tile(16, 16, 4, 1) if dtype == torch.float32 else _Tile(32 if large else 16, 32, 8, 2 if large else 1)
    if dtype == torch.float32:
        return _Tile(32, 32, 4, 1)
    return _Tile(128, 64, 4, 3) if large and key_dim <= 128 else _Tile(64, 64 if key_dim <= 128 else 32, 4, 2)


def _has_large_shared_memory(device: torch.device) -> bool:
    """Whether a block may have what data centers' GPUs have (160 KiB and more), and not 99 KiB as consumers'."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 160 * 1024


def _decode_tile(dtype: torch.dtype, key_dim: int) -> _Tile:
    """16 rows are the fewest of a product; the heads of a group fill a part of them."""
    if key_dim > 256:
        return _Tile(16, 16, 4, 1) if dtype == torch.float32 else _Tile(16, 32, 4, 2)
    return _Tile(16, 32, 4, 1) if dtype == torch.float32 else _Tile(16, 64, 2, 3)


def _pointers(
    out: torch.Tensor,
    weights: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    starts: torch.Tensor,
    used: torch.Tensor,
    table: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    return out, weights, query, keys, keys if values is None else values, starts, used, table


def _strides(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None, table: torch.Tensor
) -> tuple[int, ...]:
    """Of query, keys, values (token, block, head; block, slot, head), then of the table's rows."""
    values = keys if values is None else values
    return (*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], table.stride(0))


def _constants(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None, out: torch.Tensor, heads: int
) -> dict[str, int | bool]:
    value_dim, key_dim = out.shape[2], query.shape[2]
    shared = values is None
    return {
        "GROUP": query.shape[1] // keys.shape[2],
        "BLOCK_H": heads,
        "BLOCK_SIZE": keys.shape[1],
        "DIM": value_dim,
        "BLOCK_D": _padded(value_dim),
        "EXTRA": key_dim - value_dim if shared else 0,
        "BLOCK_E": _padded(key_dim - value_dim),
        "SHARED": shared,
        "SPLIT": SPLIT_KEYS,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }


def _padded(dim: int) -> int:
    """A product's operands have powers of two, 16 at least."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def _share(length, num_splits, SPLIT: tl.constexpr):
    """Keys of each program that has any, in whole tiles."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, num_splits), 64) * 64, SPLIT)


@triton.jit
def _find_sequence(starts, num_seqs, program, QUERIES: tl.constexpr):
    """The last sequence whose first program is not after this one."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // QUERIES + middle <= program:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def _attend(
    out,  # [T, heads, dim]; decoding: partial results [B, heads, splits, dim]
    log_sums,  # decoding: base-2 logarithms of the sums that partial results were divided by, [B, heads, splits]
    query,
    keys,
    values,
    starts,
    used,
    table,
    scale,  # times log2 e
    num_seqs,
    query_token,
    query_head,
    key_block,
    key_slot,
    key_head,
    value_block,
    value_slot,
    value_head,
    table_stride,
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SHARED: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DECODE: tl.constexpr,
):
    QUERIES: tl.constexpr = BLOCK_M // BLOCK_H
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0)
    kv_head = tl.program_id(1) // HEAD_BLOCKS
    split = tl.program_id(2)
    sequence = program if DECODE else _find_sequence(starts, num_seqs, program, QUERIES)
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    length = tl.load(used + sequence)
    if DECODE:
        first_query = 0
        share = _share(length, tl.num_programs(2), SPLIT)
        first_key = split * share
        end = tl.minimum(first_key + share, length)
        if (count != 1) | (first_key >= end):  # a prefill, or no keys left
            return
    else:
        if count == 1:
            return
        first_query = (program - start // QUERIES - sequence) * QUERIES
        if first_query >= count:
            return
        first_key = 0
        end = length - count + tl.minimum(first_query + QUERIES, count)

    row = tl.arange(0, BLOCK_M)
    query_index = first_query + row // BLOCK_H
    head_in_group = (tl.program_id(1) % HEAD_BLOCKS) * BLOCK_H + row % BLOCK_H
    present = (query_index < count) & (head_in_group < GROUP)
    head = kv_head * GROUP + head_in_group
    dim = tl.arange(0, BLOCK_D)
    query_row = query + (start + query_index).to(tl.int64) * query_token + head * query_head
    q = tl.load(query_row[:, None] + dim[None, :], mask=present[:, None] & (dim[None, :] < DIM), other=0.0)
    if EXTRA > 0:
        extra = tl.arange(0, BLOCK_E)
        q_mask = present[:, None] & (extra[None, :] < EXTRA)
        q_extra = tl.load(query_row[:, None] + DIM + extra[None, :], mask=q_mask, other=0.0)
    last_visible = length - count + query_index

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(first_key, end, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        inside = position < end
        block = tl.load(table + sequence * table_stride + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        slot = position % BLOCK_SIZE
        key_row = keys + block * key_block + slot * key_slot + kv_head * key_head
        k = tl.load(key_row[None, :] + dim[:, None], mask=inside[None, :] & (dim[:, None] < DIM), other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if EXTRA > 0:
            k_mask = inside[None, :] & (extra[:, None] < EXTRA)
            k_extra = tl.load(key_row[None, :] + DIM + extra[:, None], mask=k_mask, other=0.0)
            scores += tl.dot(q_extra, k_extra, input_precision=PRECISION)
        visible = inside[None, :] & (position[None, :] <= last_visible[:, None])
        scores = tl.where(visible, scores * scale, float("-inf"))
        greatest = tl.maximum(best, tl.max(scores, 1))
        # A row that has seen no key yet would subtract an infinity from itself.
        reference = tl.where(greatest == float("-inf"), 0.0, greatest)
        shares = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(best - reference)
        total = total * shrink + tl.sum(shares, 1)
        if SHARED:
            v = tl.trans(k)
        else:
            value_row = values + block * value_block + slot * value_slot + kv_head * value_head
            v = tl.load(value_row[:, None] + dim[None, :], mask=inside[:, None] & (dim[None, :] < DIM), other=0.0)
        result = result * shrink[:, None] + tl.dot(shares.to(v.dtype), v, input_precision=PRECISION)
        best = greatest

    result = result / tl.where(total > 0, total, 1.0)[:, None]
    num_heads = (tl.num_programs(1) // HEAD_BLOCKS) * GROUP
    if DECODE:
        place = (sequence * num_heads + head).to(tl.int64) * tl.num_programs(2) + split
        tl.store(log_sums + place, best + tl.log2(total), mask=present)
    else:
        place = (start + query_index).to(tl.int64) * num_heads + head
    mask = present[:, None] & (dim[None, :] < DIM)
    tl.store(out + place[:, None] * DIM + dim[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_splits"])
def _merge(
    out,
    partial,
    log_sums,
    starts,
    used,
    num_splits,
    num_heads,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up partial results of a decoding sequence, each by its share of the sum of exponentials."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(starts + sequence)
    if tl.load(starts + sequence + 1) - start != 1:
        return
    length = tl.load(used + sequence)
    count = tl.cdiv(length, _share(length, num_splits, SPLIT))
    dim = tl.arange(0, BLOCK_D)
    first_place = (sequence * num_heads + head).to(tl.int64) * num_splits
    best = float("-inf")
    total = 0.0
    result = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, count, BLOCK):
        split = first + tl.arange(0, BLOCK)
        logs = tl.load(log_sums + first_place + split, mask=split < count, other=float("-inf"))
        place = (first_place + split)[:, None] * DIM + dim[None, :]
        parts = tl.load(partial + place, mask=(split < count)[:, None] & (dim < DIM)[None, :], other=0.0)
        greatest = tl.maximum(best, tl.max(logs, 0))
        shrink = tl.exp2(best - greatest)
        weights = tl.exp2(logs - greatest)
        result = result * shrink + tl.sum(parts * weights[:, None], 0)
        total = total * shrink + tl.sum(weights, 0)
        best = greatest
    result = result / tl.where(total > 0, total, 1.0)
    place = (start.to(tl.int64) * num_heads + head) * DIM
    tl.store(out + place + dim, result.to(out.dtype.element_ty), mask=dim < DIM)
