"""As in tests/rollout: tiny programs are not worth a compiler's effort."""

from tests.rollout.conftest import cheap_compilation  # noqa: F401, a fixture
