"""One linear layer of a realistic size in every format, timed against dense float32 in one run."""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.quant_matmul import quant_matmul
from ..ops.quantize import quantize
from .timer import compare, interleave


def time_layer(
    formats: Sequence[str],
    *,
    in_features: int = 4096,
    out_features: int = 4096,
    rows: Sequence[int] = (1, 128),
    rounds: int = 20,
    budget_seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] | None = None,
) -> dict:
    """Time y = x @ W.T from packed weights of each format, and from dense float32.

    Every sample is one call, and the other variants' calls lie between two of the same variant, so
    weights come from memory as far as the caches are smaller than all of them together.

    Args:
        formats: names of `genai_perf.formats`.
        in_features, out_features: of the layer.
        rows: numbers of rows of x, each timed for itself.
        rounds, budget_seconds, clock: see `interleave`; the budget is for each number of rows.
        on_round: called with the number of rounds done, over all numbers of rows.

    Returns:
        dict: the `layer` part of a report. A format whose result is wrong is not timed; it stands
        in `failed` with the reason.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    packed = {name: quantize(weight, name) for name in formats}
    timed, failed = [], []
    for turn, count in enumerate(rows):
        x = torch.randn(count, in_features, generator=generator)
        variants = {"dense": lambda x=x: F.linear(x, weight)}
        errors = {"dense": _error(F.linear(x, weight), _exact(x, weight))}
        for name, qweight in packed.items():
            dense = qweight.dequantize(torch.float32)
            exact = _exact(x, dense)
            errors[name] = _error(quant_matmul(x, qweight), exact)
            # Twice what torch's own product in the same precision is off by.
            allowed = 2 * _error(F.linear(x, dense), exact) + 1e-6
            if not errors[name] <= allowed:  # not >, which a NaN would pass
                failed.append({"name": name, "rows": count, "reason":
                               f"error {errors[name]:.2g} of the largest value, allowed "
                               f"{allowed:.2g}"})  # fmt: skip
                continue
            variants[name] = lambda x=x, qweight=qweight: quant_matmul(x, qweight)
        with torch.inference_mode():
            samples = interleave(
                variants,
                rounds=rounds,
                min_sample_seconds=0,
                budget_seconds=budget_seconds,
                clock=clock,
                on_round=on_round and (lambda done, turn=turn: on_round(turn * rounds + done)),
            )
        for name, sample in samples.items():
            pair = compare(samples["dense"], sample)
            nbytes = weight.nbytes if name == "dense" else packed[name].nbytes
            timed.append({
                "name": name,
                "rows": count,
                "weight_bytes": nbytes,
                "seconds": list(sample.seconds),
                "time_ratio": {"ratio": pair.ratio, "low": pair.low, "high": pair.high},
                "error": errors[name],
            })  # fmt: skip
    return {"in_features": in_features, "out_features": out_features, "rows": timed,
            "failed": failed}  # fmt: skip


def _exact(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def _error(out: Tensor, exact: Tensor) -> float:
    """Largest difference, as a share of the largest exact value."""
    return ((out.double() - exact).abs().max() / exact.abs().max()).item()
