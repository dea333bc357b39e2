"""The operations, one package each; OPS is the only list of them."""

OPS = (
    "attention", "decode_attention", "quantize", "quant_matmul", "sparse_matmul", "distill_loss",
    "optimizer_step",
)  # fmt: skip
