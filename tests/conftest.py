"""What every test runs under: no network, one thread a process, and GPU tests only where there is a GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too: kernels, scripts, the command line

import hypothesis
import pytest
import torch

# Two workers share two cores; one thread each also keeps reductions in one order, for bitwise comparisons.
torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "fxopt",
    max_examples=int(os.environ.get("FXOPT_EXAMPLES", "100")),
    deadline=None,
    print_blob=True,
)
hypothesis.settings.register_profile(  # to see failures at once: pytest --hypothesis-profile=unshrunk
    "unshrunk", hypothesis.settings.get_profile("fxopt"), phases=[hypothesis.Phase.generate]
)
hypothesis.settings.load_profile("fxopt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` on a machine without CUDA, and say why."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here"))
