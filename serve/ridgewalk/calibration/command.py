"""`ridgewalk calibrate` on the command line. Only the flags: every command imports this file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def calibrate(
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write this hardware file. Default: the one that --hardware this-machine reads."),
    ] = None,
) -> None:
    """Measure this machine for `ridgewalk plan --hardware this-machine`: some minutes, nothing else running."""
    if out is not None and out.suffix not in (".yaml", ".yml"):
        from ridgewalk.config import ConfigError

        raise ConfigError(f"--out: {out} should end in .yaml, for `ridgewalk plan --hardware` to read it")
    from ridgewalk.calibration.run import run_calibration

    run_calibration(out)
