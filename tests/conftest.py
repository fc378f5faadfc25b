"""What several test files share."""

import os

# Before torch is imported, and for subprocesses too: the networks here are small, and on a machine that has other work
# two threads that wait for each other are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from condiff_ref.schedules import Schedule, cosine, flow, linear_beta


@pytest.fixture(params=[cosine, linear_beta, flow], ids=lambda path: path.__name__, scope="session")
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """A test that asks for it must hold on every path."""
    return request.param()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lessons first: they take longest, and at the end two processes would wait for one."""
    items.sort(key=lambda item: item.path.name != "test_lessons.py")
