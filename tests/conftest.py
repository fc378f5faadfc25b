"""What several test files share."""

import pytest

from condiff_ref.schedules import Schedule, cosine, flow, linear_beta


@pytest.fixture(params=[cosine, linear_beta, flow], ids=lambda path: path.__name__, scope="session")
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """A test that asks for it must hold on every path."""
    return request.param()
