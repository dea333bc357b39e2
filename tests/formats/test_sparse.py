"""The two sparse layouts: round trips, sizes, what the bytes are, damage that is named."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from genai_perf import CheckpointError, formats
from genai_perf.formats import SparseTensor, sparse, sparse24

LAYOUTS = {"2:4": sparse24.pack, "bitmask": sparse.pack}


def pruned(n, k, layout, dtype=torch.float32, seed=0):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "bitmask":
        return weight * (torch.rand(n, k, generator=torch.Generator().manual_seed(1)) < 0.5)
    for group in weight.split(4, dim=1):
        for row in group:
            row[row.abs().argsort()[: max(0, len(row) - 2)]] = 0
    return weight


def stored(weight, kind):
    if kind == "int8":
        return formats.get("int8").quantize(weight)
    if kind.startswith("int4"):
        group = int(kind[4:] or 128)
        return formats.get("int4").quantize(weight, group_size=group, scale_dtype=torch.bfloat16)
    return weight


KINDS = ("float32", "bfloat16", "float16", "int8", "int4", "int48", "int4-1")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind, shape", [
    *((kind, shape) for kind in KINDS for shape in ((1, 1), (3, 4), (5, 33), (16, 172), (7, 256))),
    ("bfloat16", (2, 0)), ("float32", (0, 16)),
])  # fmt: skip
def test_round_trip(tmp_path, layout, kind, shape):
    dtype = getattr(torch, kind) if kind.startswith(("fl", "bf")) else torch.float32
    weight = stored(pruned(*shape, layout, dtype), kind)
    packed = LAYOUTS[layout](weight)
    packed.check()
    dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
    assert torch.equal(packed.to_dense(), dense) and packed.to_dense().dtype == dense.dtype
    save_file(packed.state_dict("a."), tmp_path / "a.safetensors")
    again = SparseTensor.from_state_dict(load_file(tmp_path / "a.safetensors"), "a.")
    assert torch.equal(again.to_dense(), dense) and again.nbytes == packed.nbytes
    assert torch.equal(again.to("cpu").to_dense(torch.float64), dense.double())


def test_the_bytes_of_24():
    weight = torch.tensor([[0, 1, 0, 2, 3, 0, 0, 0], [0, 0, 0, 0, 4, 5, 0, 0]]).float()
    packed = sparse24.pack(weight)
    assert packed.values.tolist() == [[1, 2, 3, 0], [0, 0, 4, 5]]
    assert packed.index.tolist() == [[1 | 3 << 2 | (0 | 1 << 2) << 4], [1 << 2 | 1 << 6]]


def test_the_bytes_of_the_bitmask():
    weight = torch.tensor([[0, 1, 0, 2, 3, 0, 0, 0, 6], [0, 0, 0, 0, 4, 5, 0, 0, 0]]).float()
    packed = sparse.pack(weight)
    assert packed.values.tolist() == [1, 2, 3, 6, 4, 5]
    assert packed.index.tolist() == [[0b11010, 1], [0b110000, 0]]
    assert packed.row_start.tolist() == [0, 4, 6]


@pytest.mark.parametrize("layout, kind, bound", [
    ("2:4", "bfloat16", 0.57), ("bitmask", "bfloat16", 0.57), ("2:4", "int8", 0.35),
    ("bitmask", "int8", 0.35), ("2:4", "int4", 0.21),
])  # fmt: skip
def test_sizes(layout, kind, bound):
    """Against bf16, every byte of metadata counted."""
    weight = torch.randn(64, 256).to(torch.bfloat16)
    half = torch.arange(256) % 2 == 0
    packed = LAYOUTS[layout](stored(weight * half, kind))
    assert sum(t.nbytes for t in packed.components().values()) == packed.nbytes
    assert packed.nbytes <= bound * weight.nbytes


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="3 nonzeros at row 1, columns 4 to 7"):
        weight = torch.zeros(2, 8)
        weight[1, 5:] = 1
        sparse24.pack(weight)
    with pytest.raises(ValueError, match="got int4 with zero points"):
        sparse.pack(formats.get("int4").quantize(torch.eye(8), symmetric=False))
    with pytest.raises(ValueError, match="got nf4"):
        sparse.pack(formats.get("nf4").quantize(torch.eye(8)))
    with pytest.raises(ValueError, match="finite, got nan"):
        sparse24.pack(torch.full((1, 4), torch.nan))
    with pytest.raises(ValueError, match=r"weight must be \(N, K\)"):
        sparse.pack(torch.ones(4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("meta"), "meta is missing"),
    (lambda s: s.pop("index"), "index is missing"),
    (lambda s: s.update(meta=s["meta"][:-2]), "does not describe"),
    (lambda s: s.update(values=s["values"][..., :-1]), "values must be of shape"),
    (lambda s: s.update(values=s["values"].double()), "values must be of a float dtype"),
    (lambda s: s.update(index=s["index"][:, :-1]), "index must be uint8 of shape"),
    (lambda s: s.update(index=torch.full_like(s["index"], 255)), "index must be|values must be"),
    (lambda s: s.update(scale=torch.ones(3, 1)), "scale must be there for codes"),
])  # fmt: skip
def test_damage_is_named(layout, change, words):
    state = LAYOUTS[layout](pruned(3, 20, layout)).state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=words):
        SparseTensor.from_state_dict(state)
