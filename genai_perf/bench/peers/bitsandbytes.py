"""bitsandbytes: nf4 linear layers, quantize and dequantize of nf4 and int8, 8-bit optimizers.

On processors with AVX512-BF16 its nf4 linear has a fused kernel that rounds activations to
bfloat16; "bitsandbytes:portable" is its path for all others, dequantize and then F.linear.
"""

import torch

from ..problem import Problem, Unsupported, Variant
from ..suites import linear, optimizer_step
from ..suites.quantize import named

MODULE = "bitsandbytes"
DEVICES = ("cpu", "cuda")
VARIANTS = {
    "bitsandbytes": ("quant_matmul", "quantize", "optimizer_step"),
    "bitsandbytes:portable": ("quant_matmul",),
}


def build(variant: str, problem: Problem) -> Variant:
    if problem.op == "optimizer_step":
        return _optimizer(problem)
    options = dict(problem.options)
    fmt = options.pop("format")
    double = bool(options.pop("double_quant", False))
    if options:
        raise Unsupported(f"bitsandbytes has no {fmt} with {', '.join(options)}")
    if problem.op == "quantize":
        return _quantize(problem, fmt, double)
    if fmt != "nf4":
        raise Unsupported(f"its linear layers hold nf4 weights, the case {fmt}")
    return _linear(variant, problem, double)


def _linear(variant: str, problem: Problem, double: bool) -> Variant:
    import bitsandbytes as bnb

    x, dense = problem.inputs["x"], problem.inputs["dense"]
    kind = {"quant_type": "nf4", "compress_statistics": double}
    n, k = dense.shape
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=x.dtype, **kind)
    layer.weight = bnb.nn.Params4bit(dense.to(x.dtype), requires_grad=False, **kind)
    layer = layer.to(problem.device).eval()
    fused = bool(getattr(layer, "support_avx512bf16_for_cpu", False)) and problem.device == "cpu"
    if variant == "bitsandbytes:portable":
        if not fused:
            raise Unsupported("it is what bitsandbytes itself takes on this device")
        layer.support_avx512bf16_for_cpu = fused = False
    numerics = "bfloat16" if fused else None if x.dtype == torch.float32 else str(x.dtype)[6:]
    held = None if x.dtype == torch.float32 and not double else _held(bnb, dense.to(x.dtype), kind)
    return linear.variant(problem, layer, x, numerics=numerics, weight=held)


def _held(bnb, dense: torch.Tensor, kind: dict) -> torch.Tensor:
    """What the layer's codes stand for, in float32: rounding to the dtype of x may move a code."""
    packed, state = bnb.functional.quantize_4bit(dense, **kind)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(packed, state)


def _quantize(problem: Problem, fmt: str, double: bool) -> Variant:
    import bitsandbytes.functional as bnb

    x, quantizing = problem.inputs["x"], problem.phase == "quantize"
    if fmt == "nf4":

        def pack():
            return bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=double)

        packed, state = pack()
        if quantizing:
            return Variant(pack, lambda raw: {"out": bnb.dequantize_4bit(*raw).float()})
        return Variant(lambda: bnb.dequantize_4bit(packed, state), named)
    if fmt != "int8":
        raise Unsupported(f"bitsandbytes has no {fmt}")
    ops = torch.ops.bitsandbytes
    if problem.device == "cuda" and x.dtype != torch.float16:
        raise Unsupported("its int8 quantizer takes float16 on a GPU")
    codes, absmax, *_ = ops.int8_vectorwise_quant.default(x.clone())
    if quantizing:
        return Variant(
            lambda: ops.int8_vectorwise_quant.default(x),
            lambda raw: {"out": raw[0].float() * (raw[1][:, None].float() / 127)},
        )
    return Variant(lambda: ops.int8_vectorwise_dequant.default(codes, absmax), named)


def _optimizer(problem: Problem) -> Variant:
    import bitsandbytes as bnb

    given, kind = problem.inputs, problem.options["kind"]
    p = torch.nn.Parameter(given["p"].clone())
    p.grad = given["grad"].clone()
    made = bnb.optim.AdamW8bit if kind == "adamw" else bnb.optim.Lion8bit
    optimizer = made([p], lr=optimizer_step.LR, weight_decay=0.0)
    optimizer.step()  # makes the state, over which the case's is laid: the maps are the same
    state = optimizer.state[p]
    state["step"] = optimizer_step.STEP - 1
    names = {"exp_avg": "1", "exp_avg_sq": "2"}
    with torch.no_grad():
        p.copy_(given["p"])
        for ours, theirs in list(names.items())[: 2 if kind == "adamw" else 1]:
            state[f"state{theirs}"].copy_(given[ours])
            state[f"absmax{theirs}"].copy_(given[f"{ours}_scale"])

    def call() -> dict:
        optimizer.step()
        return {"p": p}

    return Variant(call, optimizer_step.named)
