"""Every pair of attention's features against the float64 oracle."""

import attention_axes as axes
import pytest
from attention_checks import check_oracle

from genai_perf.ops.attention.cases import make_inputs

CHOICES = axes.pairwise()


def test_every_pair_is_covered():
    names = list(axes.AXES)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            together = {(str(c[a]), str(c[b])) for c in CHOICES}
            assert len(together) == len(axes.AXES[a]) * len(axes.AXES[b]), (a, b)


@pytest.mark.parametrize("number", range(len(CHOICES)))
def test_pairs(number):
    case = axes.case_of(CHOICES[number], f"pairs {number}")
    check_oracle(make_inputs(case), (make_inputs(case, seed=seed) for seed in range(1, 100)))
