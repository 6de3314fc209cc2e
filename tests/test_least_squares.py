"""Least squares without negative terms: what a solution must fulfil, it fulfils."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.least_squares import non_negative_solution


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_no_term_is_negative_and_none_could_help_more(terms: int, rows: int, seed: int, alike: bool) -> None:
    rng = np.random.default_rng(seed)
    matrix, wanted = rng.normal(size=(rows, terms)), rng.normal(size=rows)
    if alike:
        matrix[:, -1] = matrix[:, 0]
    products, targets = matrix.T @ matrix, matrix.T @ wanted
    found = non_negative_solution(products, targets)
    slope = targets - products @ found  # half of how fast the error falls if a term grows
    assert found.min() >= 0
    assert slope.max() < 1e-7
    assert np.abs(slope[found > 1e-9]).max(initial=0.0) < 1e-7


def test_what_fits_without_negative_terms_is_found() -> None:
    rng = np.random.default_rng(0)
    matrix, true = rng.uniform(size=(40, 5)), np.array([1.0, 0.0, 2.0, 0.0, 0.5])
    found = non_negative_solution(matrix.T @ matrix, matrix.T @ (matrix @ true))
    assert found == pytest.approx(true, abs=1e-8)
    assert non_negative_solution(np.zeros((2, 2)), np.zeros(2)).tolist() == [0, 0]
