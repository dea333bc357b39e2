"""Options of the test run."""


def pytest_addoption(parser):
    what = "flash-attn's shapes: N random cases of their product, by seed; without N all (hours)"
    parser.addoption("--flash-sweep", nargs="?", const=0, type=int, metavar="N", help=what)
    parser.addoption("--flash-seed", default=0, type=int, metavar="SEED")
