"""Random attention calls against the float64 oracle: `make fuzz N=500 SEED=3`."""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import attention_axes as axes  # noqa: E402
from attention_checks import check_oracle  # noqa: E402

from genai_perf.ops.attention.cases import make_inputs  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    failed = 0
    for number in range(a.seed, a.seed + a.n):  # each case can be had alone: --n 1 --seed NUMBER
        case = axes.case_of(axes.random_choice(random.Random(number)), f"fuzz {number}")
        try:
            others = (make_inputs(case, seed=number + draw) for draw in range(1, 100))
            check_oracle(make_inputs(case, seed=number), others)
        except AssertionError as error:
            failed += 1
            print(f"seed {number}: {error}\n  {case}", flush=True)
    print(f"{a.n - failed} of {a.n} passed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
