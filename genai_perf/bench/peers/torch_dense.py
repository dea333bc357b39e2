"""What a quantized or sparse layer replaces: torch's dense linear; torch's own dynamic int8 one."""

import torch
import torch.nn.functional as F

from ..problem import Problem, Unsupported, Variant
from ..suites import linear

MODULE = None
DEVICES = ("cpu", "cuda")
VARIANTS = {
    "torch-dense": ("quant_matmul", "sparse_matmul"),
    "torch-dense:own-dtype": ("quant_matmul", "sparse_matmul"),
    "torch-int8-dynamic": ("quant_matmul",),
}


def build(variant: str, problem: Problem) -> Variant:
    x, dense = problem.inputs["x"], problem.inputs["dense"]
    if variant == "torch-int8-dynamic":
        return _int8_dynamic(problem, x, dense)
    if variant == "torch-dense":  # always float32: the same work for every activation type
        x = x.float()
    weight = dense.to(x.dtype)
    about = {} if weight.dtype == torch.float32 else {"numerics": str(weight.dtype)[6:]}
    return linear.variant(problem, lambda x: F.linear(x, weight), x, **about)


def _int8_dynamic(problem: Problem, x: torch.Tensor, dense: torch.Tensor) -> Variant:
    if problem.device != "cpu" or problem.phase != "forward":
        raise Unsupported("torch's dynamic int8 linear is for the CPU's forward only")
    if problem.options["format"] != "int8":
        raise Unsupported("it holds int8 weights, the case another format")
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import default_dynamic_qconfig

    layer = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False)
    layer.weight.data = dense
    layer.qconfig = default_dynamic_qconfig
    made = Linear.from_float(layer)
    held = made.weight().dequantize()
    x = x.float()
    # fbgemm keeps one bit of the activations' codes free, so that its sums do not saturate.
    return linear.variant(problem, made, x, numerics="int7", weight=held)
