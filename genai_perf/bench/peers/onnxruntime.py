"""ONNX Runtime's MatMulNBits on the same int4 codes and scales.

"onnxruntime" rounds activations to int8 (accuracy level 4, its fast path), "onnxruntime:fp32" does
not (level 1).
"""

import numpy as np
import torch

from ..problem import Problem, Unsupported, Variant
from ..suites.linear import named

MODULE = "onnxruntime"
DEVICES = ("cpu",)
VARIANTS = {"onnxruntime": ("quant_matmul",), "onnxruntime:fp32": ("quant_matmul",)}
_LEVEL = {"onnxruntime": 4, "onnxruntime:fp32": 1}


def build(variant: str, problem: Problem) -> Variant:
    weight, x = problem.inputs["weight"], problem.inputs["x"]
    if problem.phase != "forward":
        raise Unsupported("ONNX Runtime has no gradient here")
    if weight.format != "int4" or weight.zero_point is not None:
        raise Unsupported(f"MatMulNBits holds symmetric int4 weights, the case {weight.format}")
    if weight.group_size not in (16, 32, 64, 128, 256) or weight.shape[1] % weight.group_size:
        raise Unsupported(f"MatMulNBits has no groups of {weight.group_size}")
    if x.dtype != torch.float32:
        raise Unsupported(f"its CPU kernel takes float32, the case {x.dtype}")
    session, feed = _session(weight, _LEVEL[variant]), {"x": x.numpy()}
    return Variant(lambda: session.run(None, feed)[0], lambda raw: named(torch.from_numpy(raw)),
                   numerics="int8" if variant == "onnxruntime" else None)  # fmt: skip


def _session(weight, level: int):
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise Unsupported("onnx, which builds the graph, is not installed") from error
    import onnxruntime as ort

    (n, k), g = weight.shape, weight.group_size
    codes = weight.qdata.numpy().reshape(n, k // g, g // 2)
    scale = np.ascontiguousarray(weight.scale.float().numpy()).reshape(n * (k // g))
    node = helper.make_node("MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft",
                            K=k, N=n, bits=4, block_size=g, accuracy_level=level)  # fmt: skip
    graph = helper.make_graph(
        [node], "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scale, "scale")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[
        helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])  # fmt: skip
    model.ir_version = 9
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads else go on spinning after a call, on the cores that the next variant needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model.SerializeToString(), options,
                                providers=["CPUExecutionProvider"])  # fmt: skip
