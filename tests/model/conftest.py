"""Tiny checkpoints, saved once a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests.model.checkpoints import make_checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A saved checkpoint and the transformers model it was saved from."""

    folder: Path
    reference: torch.nn.Module

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """``[len(token_ids), vocab_size]``."""
        return self.reference(torch.tensor([token_ids])).logits[0]


@pytest.fixture(scope="session", autouse=True)
def quiet_and_single_threaded():
    """Tiny matrices gain nothing from threads, and several ranks share this process."""
    transformers_logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Function from a family's name to its checkpoint."""
    made: dict[str, Checkpoint] = {}

    def get(family: str) -> Checkpoint:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = Checkpoint(folder, make_checkpoint(family, folder))
        return made[family]

    return get
