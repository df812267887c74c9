"""One thread for every test: on a busy machine the barriers of tiny operators cost far more."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
