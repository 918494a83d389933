"""Options of the pytest benchmarks."""

import torch


def pytest_addoption(parser):
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", default=here, help=f"cuda, or cpu for tiny shapes (default here: {here})")
    parser.addoption("--cases", default="quick", choices=["quick", "full"], help="which shapes on a GPU")
