"""One linear layer from quantized weights against other libraries and torch's dense float32.

    python benchmarks/quant_matmul_vs_peers.py [--shapes 4096x4096] [--rows 1 128] [--rounds 30]

All variants take turns within one run; weights are rotated over several copies, so that none sits
in a cache; ratios are medians of the rounds' own ratios. bitsandbytes' Linear4bit is measured
twice: as it chooses on this processor, and by its path for processors without AVX512-BF16 (fused
and bf16 only in the first case, dequantize and F.linear in the second). onnxruntime (MatMulNBits,
int4 in groups of 128, accuracy level 4: activations rounded to int8) and torchao (int8, weights
only) are measured where they are installed, and torch's dynamic int8 (fbgemm, activations rounded
to int8). onnxruntime's threads are told not to spin: on two cores they would cost everybody else
half of their speed, and itself two thirds. The bytes of our weights a second are compared with what
torch reads when it adds up a large tensor. To hold ours and torch to AVX2: GENAI_PERF_ISA=avx2
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

import argparse
import importlib.metadata
import importlib.util
import warnings
from itertools import cycle

import bitsandbytes
import torch
import torch.nn.functional as F

import genai_perf as gp
from genai_perf._backends import native
from genai_perf.bench.machine import machine
from genai_perf.bench.timer import compare, interleave

OPTIONAL = ("onnxruntime", "torchao")
READING = "torch.sum of 64 MiB"
INT8 = "ours int8, int8 x"
OURS = {
    "nf4": ("nf4", {}),
    "nf4 double": ("nf4", {"double_quant": True}),
    "int4 g128": ("int4", {}),
    "int8": ("int8", {}),
    "fp8": ("fp8", {}),
}


def rotating(copies: list, call):
    """`call(copy)` with another copy each time."""
    turn = cycle(copies)
    return lambda: call(next(turn))


def bnb_layer(weight: torch.Tensor, *, fused: bool | None):
    nf4 = {"quant_type": "nf4", "compress_statistics": False}
    n, k = weight.shape
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, **nf4)
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, **nf4)
    layer = layer.to("cpu").eval()
    if fused is False:
        layer.support_avx512bf16_for_cpu = False
    return layer


def onnx_layers(weights: list, rows: int, x: torch.Tensor) -> list:
    """onnxruntime sessions, one MatMulNBits node each, over our own int4 codes: stored alike."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    n, k = weights[0].shape
    feed = {"x": x.float().numpy()}
    calls = []
    for w in weights:
        node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft",
                                K=k, N=n, bits=4, block_size=128, accuracy_level=4)  # fmt: skip
        codes = numpy_helper.from_array(w.qdata.view(n, k // 128, 64).numpy(), "b")
        scales = numpy_helper.from_array(w.scale.flatten().numpy(), "s")
        graph = helper.make_graph(
            [node], "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, n])],
            [codes, scales],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"],
        )  # fmt: skip
        got = torch.from_numpy(session.run(None, feed)[0])
        want = x.float() @ w.dequantize(torch.float32).T
        if (got - want).abs().max() > 0.05 * want.abs().max():
            raise SystemExit("onnxruntime and the reference read the int4 codes differently")
        calls.append(lambda session=session: session.run(None, feed))
    return calls


def torchao_layer(weight: torch.Tensor) -> torch.nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    quantize_(layer, Int8WeightOnlyConfig())
    return layer.eval()


def dynamic_layer(weight: torch.Tensor) -> torch.nn.Module:
    layer = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    layer[0].weight.data = weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, torch.qint8)


def variants(n: int, k: int, rows: int, dtype: torch.dtype, copies: int) -> tuple[dict, dict]:
    """The calls, and the bytes of the weights that each of ours reads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    dense = [torch.randn(n, k, generator=generator) / k**0.5 for _ in range(copies)]
    x32 = x.float()
    large = [torch.zeros(1 << 24) for _ in range(2)]
    calls = {
        "torch dense fp32": rotating(dense, lambda w: F.linear(x32, w)),
        READING: rotating(large, torch.sum),
    }
    size = {READING: large[0].nbytes}
    for name, (fmt, options) in OURS.items():
        weights = [gp.quantize(w, fmt, **options) for w in dense]
        calls[f"ours {name}"] = rotating(weights, lambda w: gp.quant_matmul(x, w))
        size[f"ours {name}"] = weights[0].nbytes
        if fmt == "int8":
            calls[INT8] = rotating(weights, lambda w: gp.quant_matmul(x, w, activations="int8"))
            size[INT8] = weights[0].nbytes
        if name == "int4 g128" and has("onnxruntime", "onnx"):
            calls["onnxruntime int4 g128, int8 x"] = rotating(
                onnx_layers(weights, rows, x), lambda call: call()
            )
    for name, fused in (("bitsandbytes nf4", None), ("bitsandbytes nf4, no AVX512-BF16", False)):
        layers = [bnb_layer(w.to(dtype), fused=fused) for w in dense]
        calls[name] = rotating(layers, lambda layer: layer(x))
    if has("torchao"):
        layers = [torchao_layer(w.to(dtype)) for w in dense]
        calls["torchao int8"] = rotating(layers, lambda layer: layer(x))
    if hasattr(torch.ao.quantization, "quantize_dynamic"):
        layers = [dynamic_layer(w) for w in dense]
        calls["torch dynamic int8"] = rotating(layers, lambda layer: layer(x32))
    return calls, size


def has(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="outputs x inputs")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--budget", type=float, default=60, help="seconds for each table")
    a = parser.parse_args()
    print(machine(), f"ours {native.lib().isa()}, torch {torch.__version__}",
          torch.backends.cpu.get_cpu_capability(), f"bitsandbytes {bitsandbytes.__version__},",
          *(f"{name} {importlib.metadata.version(name)}," for name in OPTIONAL if has(name)),
          f"{torch.get_num_threads()} threads", flush=True)  # fmt: skip
    for shape in a.shapes:
        n, k = map(int, shape.split("x"))
        for rows in a.rows:
            for dtype in a.dtypes:
                calls, size = variants(n, k, rows, getattr(torch, dtype), a.copies)
                with torch.inference_mode():
                    samples = interleave(calls, rounds=a.rounds, budget_seconds=a.budget)
                report(f"{shape}, {rows} row(s), {dtype}", samples, size)


def report(title: str, samples: dict, size: dict) -> None:
    peers = [name for name in samples if not name.startswith("ours") and name != READING]
    reading = size[READING] / samples[READING].median
    print(f"\n{title}: ms, share of {reading / 1e9:.1f} GB/s, and speed over each peer")
    for name, sample in samples.items():
        share = f"{100 * size[name] / sample.median / reading:5.0f} %" if name in size else " " * 7
        ratios = (f"{1 / compare(samples[p], sample).ratio:7.2f}x" for p in peers)
        print(f"  {name:34s}{1e3 * sample.median:9.3f}  ", share, *ratios, flush=True)
    print("  peers in order:", "; ".join(peers))


if __name__ == "__main__":
    main()
