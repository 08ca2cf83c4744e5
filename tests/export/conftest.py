"""What the tests of exporting share."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Several processes test at once: more threads than cores only make them wait for each other."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
