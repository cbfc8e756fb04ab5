"""Offline, quiet and single-threaded, before anything imports transformers."""

from __future__ import annotations

import gc
import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

from tests.record import pytest_addoption, sighted  # noqa: F401

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Collected tests and imported modules live to the end: later garbage collections leave them out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes a stack for each absent accelerator, too
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
