"""A valid report with made-up numbers, for the schema and the page."""

from genai_perf.bench import schema

VARIANTS = {  # bytes on disk, perplexity, prefill and decode tokens/s
    "dense": (8_130_560, 27.90, 4100, 121.0),
    "int8-rtn": (5_300_000, 27.94, 4300, 118.0),
    "fp8-rtn": (5_310_000, 28.12, 3900, 115.0),
    "nf4-rtn": (3_900_000, 29.40, 3800, 117.0),
    "int4-rtn": (3_850_000, 30.90, 3700, 119.0),
    "int4-gptq": (3_850_000, 29.60, 3750, 119.5),
    "sparsegpt-0.5": (8_130_560, 31.70, 4080, 120.0),
    "sparsegpt-2:4": (8_130_560, 35.20, 4120, 121.5),
    "sparsegpt-0.5+int4-gptq": (3_850_000, 34.10, 3740, 118.9),
}


def interval(ratio: float) -> dict:
    return {"ratio": ratio, "low": ratio * 0.97, "high": ratio * 1.04}


def sample_report() -> dict:
    dense = VARIANTS["dense"]
    variants = [
        {
            "name": name,
            "bytes_on_disk": size,
            "peak_rss_bytes": 310_000_000 + size,
            "baseline_rss_bytes": 280_000_000,
            "perplexity": perplexity,
            "nll": 3.3,
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": decode,
            "prefill_time_ratio": interval(dense[2] / prefill),
            "decode_time_ratio": interval(dense[3] / decode),
            "prefill_seconds": [256 / prefill] * 5,
            "decode_seconds": [32 / decode] * 5,
            "compress_seconds": None if name == "dense" else 4.2,
            "recipe": None if name == "dense" else {"steps": [{"name": name}], "skip": ["lm_head"]},
            "notes": [
                "model.layers.0.mlp.down_proj: 688 columns do not divide by 128: groups of 16"
            ]
            if "int4" in name
            else [],
        }
        for name, (size, perplexity, prefill, decode) in VARIANTS.items()
    ]
    layer = [
        {
            "name": name,
            "rows": rows,
            "weight_bytes": size,
            "seconds": [seconds * rows**0.6] * 7,
            "time_ratio": interval(seconds / 0.0061 * (1 if rows == 1 else 1.4)),
            "error": 1e-6,
        }
        for rows in (1, 128)
        for name, size, seconds in (
            ("dense", 67_108_864, 0.0061 if rows == 1 else 0.0061 / 1.4),
            ("int8", 16_793_600, 0.0021),
            ("fp8", 16_793_600, 0.0027),
            ("nf4", 9_437_184, 0.0016),
            ("int4", 8_912_896, 0.0013),
        )
    ]
    return {
        "schema_version": schema.VERSION,
        "kind": "demo",
        "created": "2026-01-31T12:00:00+00:00",
        "seconds": 151.2,
        "commit": None,
        "versions": {"genai_perf": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "triton": None},
        "machine": {
            "cpu": "Example CPU 9000",
            "cpu_flags": ["avx2", "fma", "f16c"],
            "isa": "avx2",
            "cores_usable": 2,
            "torch_threads": 2,
            "memory_bytes": 16 << 30,
            "system": "Linux 6.1 x86_64",
            "load_average": 0.4,
            "cores_busy": 0.0,
        },
        "model": {
            "name": "tiny_python_lm",
            "parameters": 4_063_744,
            "architecture": "LlamaForCausalLM",
        },
        "settings": {
            "busy": None,
            "bytes_on_disk": "Weights on disk are the *.safetensors files.",
            "peak_rss": "Peak memory is the most that a fresh process held.",
            "perplexity": "Perplexity over 40 windows of 256 tokens.",
            "speed": "Medians of 20 rounds, the variants in turn.",
            "layer": "Medians of 15 rounds.",
            "calibration": "64 windows of 256 tokens of the standard library.",
            "evaluation": "40 windows of 256 tokens of held-out modules.",
        },
        "variants": variants,
        "layer": {"in_features": 4096, "out_features": 4096, "rows": layer},
    }
