"""vLLM, with the settings of a machine without a GPU; tests that import it are skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("vllm") is not None:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # tests look into the model
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
vllm = pytest.importorskip("vllm")
