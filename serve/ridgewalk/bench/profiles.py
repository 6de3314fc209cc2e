"""Workloads, read from data files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import msgspec
import yaml

from ridgewalk.bench.lengths import LogNormalLengths, lognormal_with_share_above, lognormal_with_share_within
from ridgewalk.config import ConfigError
from ridgewalk.placement.data_files import shipped_names, shipped_path


@dataclass(frozen=True)
class Profile:
    """Where the lengths of prompts and outputs come from; tokens at scale 1."""

    name: str
    about: str
    prompts: LogNormalLengths
    outputs: LogNormalLengths


class _Lengths(msgspec.Struct, forbid_unknown_fields=True):
    """A lognormal distribution: by median and sigma, by a share above a length, or by a share within two."""

    longest: int
    median: float | None = None
    sigma: float | None = None
    above: float | None = None
    within: tuple[float, float] | None = None
    share: float | None = None

    def distribution(self) -> LogNormalLengths:
        """What the fields describe. Raises ValueError when they describe none."""
        if self.within is not None and self.share is not None:
            return lognormal_with_share_within(*self.within, self.share, longest=self.longest)
        if self.above is not None and self.share is not None and self.sigma is not None:
            return lognormal_with_share_above(self.above, self.share, sigma=self.sigma, longest=self.longest)
        if self.median is not None and self.sigma is not None:
            return LogNormalLengths(self.median, self.sigma, longest=self.longest)
        raise ValueError("lengths need median and sigma, or within and share, or above, share and sigma")


class _File(msgspec.Struct, forbid_unknown_fields=True):
    about: str
    prompts: _Lengths
    outputs: _Lengths


def read_profile(path: Path) -> Profile:
    """A workload file.

    Raises:
        ConfigError: it cannot be read or describes no workload; names the file.
    """
    try:
        file = msgspec.convert(yaml.safe_load(path.read_text()), _File)
        return Profile(path.stem, file.about, file.prompts.distribution(), file.outputs.distribution())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"{path} describes no workload: {error}") from None


def _shipped() -> dict[str, Profile]:
    paths = [shipped_path("workloads", name) for name in shipped_names("workloads")]
    profiles = [read_profile(path) for path in paths if path is not None]
    return {profile.name: profile for profile in profiles}


PROFILES: Mapping[str, Profile] = MappingProxyType(_shipped())
"""``reasoning`` follows published quantiles; the lengths of the others are our choice."""
