"""One app for the tests of its endpoints."""

import gc
import os

import pytest

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


@pytest.fixture(autouse=True, scope="module")
def leftovers():
    """Sockets of gradio_client that nobody closes are told of here, where it is no error, and not in other tests."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def app_url():
    """The address of the app with its default limits, in this process."""
    from trimtab.studio import build, launch_options

    page = build()
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield url
    page.close()
