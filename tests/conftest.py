"""Settings that hold for all tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub, which reads it once

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    """Alike on every machine; OMP_NUM_THREADS=1 still holds, where other work needs the cores."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
