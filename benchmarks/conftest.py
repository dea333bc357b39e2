"""`pytest benchmarks --benchmark-json out.json`: the headline cases for CI that knows that format.

The device is the GPU if there is one.
"""

import pytest


def pytest_collection_modifyitems(config, items):
    if not config.pluginmanager.hasplugin("benchmark"):
        skip = pytest.mark.skip(reason="pytest-benchmark is not installed")
        for item in items:
            item.add_marker(skip)
