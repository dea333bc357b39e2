"""What the tests of several ops share."""

import pytest


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    """Every instruction set the native kernels are built for, one after the other."""
    native = pytest.importorskip("genai_perf._C", reason="the native extension is not built")
    before = native.isa()
    try:
        native.force_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.force_isa(before)
