"""The operations, one package each; OPS is the only list of them."""

OPS = ("attention", "quantize", "quant_matmul", "distill_loss")
