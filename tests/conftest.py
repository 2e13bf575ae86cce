"""Settings that hold for all tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub, which reads it once

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    """Timings and reductions alike on every machine; a test's own settings are its own business."""
    torch.set_num_threads(2)
