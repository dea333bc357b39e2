"""The cases that tests and benchmarks share."""

from dataclasses import dataclass, field

import torch

from ... import formats


@dataclass(frozen=True)
class Case:
    """One tensor and one way to quantize it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: str
    tags: frozenset[str]
    options: dict = field(default_factory=dict)


VARIANTS = {
    "int8": ("int8", {}),
    "fp8": ("fp8", {}),
    "fp8-tensor": ("fp8", {"granularity": "tensor"}),
    "fp8-block": ("fp8", {"granularity": "block"}),
    "fp8_e5m2": ("fp8_e5m2", {}),
    "fp8_240": ("fp8_240", {}),
    "nf4": ("nf4", {}),
    "nf4-b128": ("nf4", {"group_size": 128}),
    "nf4-double": ("nf4", {"double_quant": True}),
    "fp4": ("fp4", {}),
    "fp4-double": ("fp4", {"double_quant": True}),
    "int4": ("int4", {}),
    "int4-row": ("int4", {"group_size": -1}),
    "int4-asym": ("int4", {"group_size": 32, "symmetric": False}),
    "int4-bf16": ("int4", {"group_size": 64, "scale_dtype": torch.bfloat16}),
    "int3": ("int3", {}),
    "int3-asym": ("int3", {"group_size": 32, "symmetric": False}),
    "int2": ("int2", {"group_size": 64, "scale_dtype": torch.bfloat16}),
    "int2-asym-row": ("int2", {"group_size": -1, "symmetric": False}),
    "fp8-group": ("fp8", {"granularity": "group"}),
    "fp8_e3m4": ("fp8_e3m4", {}),
    "fp8_e3m4-block": ("fp8_e3m4", {"granularity": "block"}),
    "dynamic8": ("dynamic8", {}),
    "dynamic8-b4096": ("dynamic8", {"group_size": 4096}),
    "int4-asym-fp16": ("int4", {"symmetric": False, "scale_dtype": torch.float16}),
}
EDGES = {
    "one": (1, 1),
    "vector": (67,),
    "ragged": (3, 203),
    "wide-rows": (2, 4100),
    "experts": (3, 130, 70),
}


def _cases() -> tuple[Case, ...]:
    found = []
    for name, (format, options) in VARIANTS.items():

        def add(tag, shape, dtype, tags, name=name, format=format, options=options):
            case = Case(f"{name}-{tag}", shape, dtype, format, frozenset(tags), options)
            found.append(case)

        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            add(str(dtype).removeprefix("torch."), (40, 384), dtype, {"smoke"})
        for edge, shape in EDGES.items():
            add(edge, shape, torch.float32, {"edge"})
        for dtype in (torch.float32, torch.bfloat16):
            add(f"4096-{dtype}".replace("torch.", ""), (4096, 4096), dtype, {"bench"})
    return tuple(found)


CASES = _cases()


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """A weight whose rows differ in size, with a run of zeros longer than any block of 64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.shape, generator=generator)
    x *= torch.exp(torch.randn((*case.shape[:-1], 1), generator=generator))
    if x.numel() > 1000:
        x.view(-1)[200:400] = 0
    return x.to(case.dtype).to(device)


def cost(case: Case) -> tuple[int, int]:
    """(flops, bytes): quantizing reads the tensor and writes its components, and the reverse."""
    chosen = formats.get(case.format)
    layout = chosen.layout(case.shape, chosen.spec(**case.options)).values()
    count = torch.Size(case.shape).numel()
    packed = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout)
    return 2 * count, count * case.dtype.itemsize + packed
