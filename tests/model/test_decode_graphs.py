"""Which captured step a decode step runs in. That they compute what other steps do is in `test_equality`, on a GPU."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.model.decode_graphs import padded_batch


@given(count=st.integers(1, 2000))
def test_padding_is_a_quarter_at_most(count):
    padded = padded_batch(count)
    assert padded >= count
    assert padded_batch(padded) == padded
    if count >= 32:
        assert padded <= 1.25 * count


def test_few_sizes_are_captured():
    assert sorted({padded_batch(count) for count in range(1, 65)}) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert len({padded_batch(count) for count in range(1, 513)}) == 23
