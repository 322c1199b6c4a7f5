"""What every test shares: no network, one thread, fixed seeds.

hookgraph is not imported here: the shape-checking import hook of jaxtyping has to come first.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["HOOKGRAPH_CACHE"] = "off"

import random
import sys
from collections.abc import Generator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings

from hookgraph_tests import checking

torch.set_num_threads(1)
jaxtyping.jaxtyped = checking.jaxtyped

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def kept_bindings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what was proven of the models that many tests bind, where proofs are not their subject."""
    return tmp_path_factory.mktemp("bindings")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _figures_closed() -> Generator[None]:
    """No test leaves figures open: pyplot warns of many."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
