"""How the tests are shared out between worker processes (`make test` starts two, with ``--dist loadgroup``)."""

from __future__ import annotations

import pytest

RAY = "ray"
"""All tests that start a Ray cluster: one after the other, for each wants the whole machine at times."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files stay whole, for the sake of their fixtures. What takes longest comes first, so that no worker is left alone
    with it at the end.
    """
    groups = {item: _group(item) for item in items}
    slow = {groups[item] for item in items if item.get_closest_marker("slow")}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (groups[item] != RAY, groups[item] not in slow))


def _group(item: pytest.Item) -> str:
    if item.get_closest_marker("ray"):
        return RAY
    folder = item.path.parent.name
    return folder if folder == "zoo" else item.nodeid.partition("::")[0]  # the shipped models are judged once
