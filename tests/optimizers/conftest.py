from tests.model.conftest import one_process  # noqa: F401
