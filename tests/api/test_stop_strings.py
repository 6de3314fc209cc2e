"""Stop strings against the plain definition: the first to be complete ends the text, the longest of those."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ridgewalk.api.stop_strings import StopAutomaton, StopStringFilter

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)
PIECES = st.lists(st.text("abc", max_size=5), max_size=12)


def run(stops: list[str], pieces: list[str], include: bool = False) -> tuple[str, str | None, list[str]]:
    stop_filter = StopStringFilter(StopAutomaton(stops), include)
    shown = [stop_filter.push(piece) for piece in pieces]
    if stop_filter.matched is None:
        shown.append(stop_filter.flush())
    return "".join(shown), stop_filter.matched, shown


def expected(stops: list[str], text: str, include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(STOPS, PIECES, st.booleans())
def test_any_cut_into_pieces_gives_the_same_text(stops: list[str], pieces: list[str], include: bool) -> None:
    assert run(stops, pieces, include)[:2] == expected(stops, "".join(pieces), include)


@given(STOPS, PIECES)
def test_only_the_start_of_a_stop_string_is_held_back(stops: list[str], pieces: list[str]) -> None:
    stop_filter = StopStringFilter(StopAutomaton(stops))
    seen = shown = ""
    for piece in pieces:
        seen += piece
        shown += stop_filter.push(piece)
        if stop_filter.matched:
            return
        held = seen.removeprefix(shown)
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_nothing_is_shown_after_a_match() -> None:
    stop_filter = StopStringFilter(StopAutomaton(["END"]))
    assert stop_filter.push("one E") == "one "
    assert stop_filter.push("ND two") == ""
    assert stop_filter.matched == "END"
    assert stop_filter.push("three") == ""


def test_a_stop_string_that_comes_too_early_is_text() -> None:
    stop_filter = StopStringFilter(StopAutomaton(["ab"]))
    text = stop_filter.push("xab", may_stop=False)
    text += stop_filter.push("yab")
    assert (text, stop_filter.matched) == ("xaby", "ab")
