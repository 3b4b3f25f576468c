"""The process groups of a single process, for tests that build a model."""

from tests.model.conftest import one_process as one_process
