"""Workloads, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ridgewalk.bench.lengths import LogNormalLengths, lognormal_with_share_above, lognormal_with_share_within


@dataclass(frozen=True)
class Profile:
    """Where the lengths of prompts and outputs come from; tokens at scale 1."""

    name: str
    about: str
    prompts: LogNormalLengths
    outputs: LogNormalLengths


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile(
                "chat",
                "short answers: half of the prompts under 120 tokens, half of the outputs under 180",
                prompts=LogNormalLengths(120.0, 0.8, longest=4_096),
                outputs=LogNormalLengths(180.0, 0.7, longest=2_048),
            ),
            # arXiv 2605.19775: 77 % of the prompts within 50 to 150 tokens, 45 % of the outputs over 5,000. That both
            # are lognormal, the cut and the outputs' sigma are our stand-ins.
            Profile(
                "reasoning",
                "long chains of thought: 77 % of the prompts within 50 to 150 tokens, 45 % of the outputs over 5,000",
                prompts=lognormal_with_share_within(50, 150, 0.77, longest=2_048),
                outputs=lognormal_with_share_above(5_000, 0.45, sigma=0.9, longest=9_000),
            ),
            Profile(
                "long-prompt",
                "documents: half of the prompts over 8,000 tokens, half of the outputs under 200",
                prompts=LogNormalLengths(8_000.0, 0.6, longest=32_768),
                outputs=LogNormalLengths(200.0, 0.6, longest=1_024),
            ),
        )
    }
)
"""``reasoning`` follows published quantiles; the lengths of the others are our choice."""
