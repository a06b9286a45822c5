"""What the tests share. `--slow`: also those that do damage for minutes (`bash test.sh --slow`).

`--examples`: those in other people's loops, alone (`bash test.sh --examples`); they need what
requirements-examples.txt lists.
"""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addoption("--examples", action="store_true", help="run the tests of examples/ alone")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; skipped without --slow")
    config.addinivalue_line("markers", "examples: imports frameworks; skipped without --examples")


def pytest_collection_modifyitems(config, items):
    examples = config.getoption("--examples")
    others = [item for item in items if not item.get_closest_marker("examples")]
    if examples and others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("examples")]
    for name, wanted in (("slow", config.getoption("--slow")), ("examples", examples)):
        for item in items:
            if item.get_closest_marker(name) and not wanted:
                reason = f"{name}: bash test.sh --{name} runs it"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def one_thread():
    """Runs that are compared to the bit, and beside others, compute on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
