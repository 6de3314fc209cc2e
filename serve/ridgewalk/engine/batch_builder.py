"""Writes a scheduled step down for the ranks: only what they do not know yet."""

from __future__ import annotations

from ridgewalk.engine.request import Request
from ridgewalk.engine.step import NO_TOKEN, PLACEHOLDER_TOKEN, BlockCopy, GroupBatch, NewSequence


class BatchBuilder:
    """Tracks which sequences, blocks and tokens the ranks hold, and sends the difference."""

    def __init__(self, num_groups: int, counts_only: bool = False) -> None:
        self._counts_only = counts_only
        self._dropped: list[list[int]] = [[] for _ in range(num_groups)]

    def forget(self, request: Request) -> None:
        """The request ended or was preempted: ranks drop its state with the next step of its group."""
        if request.held_by_ranks:
            self._dropped[request.group].append(request.seq_id)
        request.held_by_ranks = False
        request.num_blocks_sent = 0
        request.num_tokens_sent = 0

    def build(self, group: int, rows: list[tuple[Request, int]], copies: list[BlockCopy]) -> GroupBatch:
        """The message for ``rows`` of (request, tokens to compute), before the requests are advanced."""
        batch = GroupBatch([], [], [], [], [], [], [], self._dropped[group], copies)
        self._dropped[group] = []
        if self._counts_only:
            _add_counts(batch, rows)
            return batch
        for request, num_tokens in rows:
            self._add(batch, request, num_tokens)
        return batch

    def _add(self, batch: GroupBatch, request: Request, num_tokens: int) -> None:
        last_token = NO_TOKEN
        if not request.held_by_ranks:
            batch.new_sequences.append(
                NewSequence(request.seq_id, request.token_ids[:], request.num_prompt_tokens, request.sampling)
            )
            request.held_by_ranks = True
            request.num_tokens_sent = request.num_tokens
        elif request.num_tokens + request.num_placeholders > request.num_tokens_sent:
            last_token = PLACEHOLDER_TOKEN if request.num_placeholders else request.token_ids[-1]
            request.num_tokens_sent += 1
        batch.seq_ids.append(request.seq_id)
        batch.num_computed_tokens.append(request.num_computed_tokens)
        batch.num_scheduled_tokens.append(num_tokens)
        batch.new_block_ids.append(request.block_ids[request.num_blocks_sent :])
        batch.last_token_ids.append(last_token)
        batch.samples.append(num_tokens == request.num_tokens_to_compute)
        request.num_blocks_sent = len(request.block_ids)


def _add_counts(batch: GroupBatch, rows: list[tuple[Request, int]]) -> None:
    """What a simulation reads of a step: which sequences, how far they are, how much is computed."""
    batch.seq_ids.extend([request.seq_id for request, _ in rows])
    batch.num_computed_tokens.extend([request.num_computed_tokens for request, _ in rows])
    batch.num_scheduled_tokens.extend([num_tokens for _, num_tokens in rows])
    batch.samples.extend(
        [
            num_tokens == len(request.token_ids) + request.num_placeholders - request.num_computed_tokens
            for request, num_tokens in rows
        ]
    )
