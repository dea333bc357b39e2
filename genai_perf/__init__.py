"""Performance engineering for transformer models: custom kernels and compression.

Names are loaded when first used: `import genai_perf` imports no triton, nki or transformers.
"""

from importlib import import_module

from ._version import __version__

_EXPORTS = {
    "BackendUnsupported": "_errors",
    "CalibrationError": "_errors",
    "CheckpointError": "_errors",
    "backends": "_backends",
    "explain": "nn.explaining",
    "QuantizedTensor": "formats",
    "attention": "ops.attention",
    "flash_attn_func": "flash_attn",
    "flash_attn_kvpacked_func": "flash_attn",
    "flash_attn_qkvpacked_func": "flash_attn",
    "flash_attn_varlen_func": "flash_attn",
    "flash_attn_varlen_kvpacked_func": "flash_attn",
    "flash_attn_varlen_qkvpacked_func": "flash_attn",
    "decode_attention": "ops.decode_attention",
    "flash_attn_with_kvcache": "ops.decode_attention",
    "quantize": "ops.quantize",
    "dequantize": "ops.quantize",
    "quant_matmul": "ops.quant_matmul",
    "SparseTensor": "formats",
    "sparse_matmul": "ops.sparse_matmul",
    "QuantLinear": "nn",
    "SparseLinear": "nn",
    "pack_sparse": "io.sparse_file",
    "quantize_model": "nn",
    "compress": "integrations.pipeline",
    "prune_structured": "integrations.structured",
    "Recipe": "compression",
    "RTN": "compression",
    "GPTQ": "compression",
    "SparseGPT": "compression",
    "Magnitude": "compression",
    "Wanda": "compression",
    "RIA": "compression",
    "load_compressed": "integrations.transformers",
    "patch": "integrations.patching",
    "unpatch": "integrations.patching",
    "route_sdpa": "integrations.sdpa",
}
_SUBMODULES = (
    "bench",
    "compression",
    "distill",
    "flash_attn",
    "formats",
    "integrations",
    "io",
    "neuron",
    "nn",
    "ops",
    "optim",
    "testing",
)

__all__ = ["__version__", *_EXPORTS]


def _refuse_namesake() -> None:
    """NVIDIA's retired client benchmark, distribution genai-perf, has the same import name."""
    from importlib.metadata import PackageNotFoundError, distribution
    from pathlib import Path

    try:
        theirs = distribution("genai-perf")
    except PackageNotFoundError:
        return
    if Path(str(theirs.locate_file("genai_perf"))).resolve() == Path(__file__).resolve().parent:
        raise ImportError(
            "genai_perf: NVIDIA's genai-perf is installed over this package (genaiperf), in the "
            "same folder; run `pip uninstall genai-perf`, then reinstall genaiperf"
        )


_refuse_namesake()


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    elif name in _SUBMODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_EXPORTS, *_SUBMODULES])
