"""One line per event on standard error, from every process of the service; Ray brings them to the terminal."""

from __future__ import annotations

import logging
import sys


def configure_logging() -> None:
    """Show Ridgewalk's own log from INFO on. Other libraries keep their settings. Idempotent."""
    logger = logging.getLogger("ridgewalk")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO)
