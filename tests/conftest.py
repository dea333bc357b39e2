"""Options of the test run."""


def pytest_addoption(parser):
    what = "flash-attn's shapes: their whole product, not a sample (hours)"
    parser.addoption("--flash-sweep", action="store_true", help=what)
