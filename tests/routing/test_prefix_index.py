"""The ingress's memory of prompts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.routing.prefix_index import PREFIX_BLOCK, PrefixIndex, prefix_hashes

short_prompts = st.lists(st.integers(0, 1), min_size=0, max_size=4).map(
    lambda blocks: [token for block in blocks for token in [block] * PREFIX_BLOCK]
)


@given(st.lists(st.tuples(short_prompts, st.sampled_from("abc")), max_size=12), short_prompts)
def test_it_knows_the_longest_beginning_that_each_replica_has_seen(
    sent: list[tuple[list[int], str]], prompt: list[int]
) -> None:
    index = PrefixIndex()
    for tokens, replica_id in sent:
        index.note(prefix_hashes(tokens), replica_id)
    expected: dict[str, int] = {}
    for tokens, replica_id in sent:
        shared = next((at for at, pair in enumerate(zip(tokens, prompt)) if pair[0] != pair[1]), None)  # noqa: B905
        length = (min(len(tokens), len(prompt)) if shared is None else shared) // PREFIX_BLOCK * PREFIX_BLOCK
        if length:
            expected[replica_id] = max(expected.get(replica_id, 0), length)
    assert index.cached_tokens(prefix_hashes(prompt)) == expected


def test_a_rest_that_fills_no_block_is_not_hashed() -> None:
    prompt = list(range(3 * PREFIX_BLOCK))
    assert prefix_hashes(prompt[: PREFIX_BLOCK - 1]) == ()
    assert prefix_hashes([*prompt, 1]) == prefix_hashes(prompt)
    assert prefix_hashes([5, *prompt[1:]])[2] != prefix_hashes(prompt)[2]


def test_memory_is_bounded_and_the_ends_of_old_prompts_go_first() -> None:
    index, old = PrefixIndex(max_blocks=10), prefix_hashes(list(range(8 * PREFIX_BLOCK)))
    index.note(old, "a")
    index.note(prefix_hashes(list(range(1, 4 * PREFIX_BLOCK + 1))), "b")
    assert len(index) == 10
    assert index.cached_tokens(old) == {"a": 6 * PREFIX_BLOCK}
