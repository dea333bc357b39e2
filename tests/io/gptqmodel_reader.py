"""GPTQModel's torch kernel reads our GPTQ files, to the bit; run by `make check-gptqmodel`.

It needs a newer torch than the other tests, hence an environment of its own and no pytest.
"""

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

from genai_perf import formats
from genai_perf.compression import gptq as solver
from genai_perf.io import gptq


def quantized(bits: int, group_size: int, dtype: torch.dtype) -> formats.QuantizedTensor:
    generator = torch.Generator().manual_seed(bits + group_size)
    weight = (0.05 * torch.randn(96, 256, generator=generator)).to(dtype)
    x = torch.randn(512, 256, generator=generator)
    return solver.solve(weight, x.T @ x, bits=bits, group_size=group_size,
                        scale_dtype=dtype).qweight  # fmt: skip


def read(tensors: dict[str, torch.Tensor], qt: formats.QuantizedTensor, bits: int) -> TorchLinear:
    out_features, in_features = qt.shape
    layer = TorchLinear(
        bits=bits, group_size=qt.group_size, sym=True, desc_act=False, in_features=in_features,
        out_features=out_features, bias=False, pack_dtype=torch.int32,
    )  # fmt: skip
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        buffer = getattr(layer, part)
        stored = tensors[f"layer.{part}"]
        if buffer.shape != stored.shape or buffer.dtype != stored.dtype:
            raise SystemExit(f"{part}: GPTQModel wants {buffer.dtype} {tuple(buffer.shape)}, "
                             f"we write {stored.dtype} {tuple(stored.shape)}")  # fmt: skip
        buffer.copy_(stored)
    convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer.post_init()
    return layer.eval()


def main() -> None:
    for bits, group_size in ((4, 32), (4, 64), (4, 128), (4, -1), (8, -1)):
        qt = quantized(bits, group_size, torch.float16)
        layer = read(gptq.encode("layer", qt), qt, bits)
        ours = qt.dequantize(torch.float16)
        if not torch.equal(layer.dequantize_weight().T, ours):
            raise SystemExit(f"int{bits} in groups of {group_size}: GPTQModel reads other weights")
        x = torch.randn(5, qt.shape[1]).half()
        with torch.no_grad():
            found = layer(x)
        torch.testing.assert_close(found, x @ ours.T, rtol=5e-3, atol=5e-3)
        print(f"int{bits} in groups of {group_size}: equal")


if __name__ == "__main__":
    main()
