"""Blocks that do not fit a device, run there one layer at a time: a CPU stands in for the device,
with as little free as the test says."""

import pytest
import torch
from safetensors.torch import load_file

import genai_perf as gp
from genai_perf import CheckpointError
from genai_perf.integrations import checkpoint_model, offload, pipeline
from genai_perf.integrations.checkpoint_model import CheckpointModel

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer calibration tokens:UserWarning")
IDS = torch.randint(1, 96, (20, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def little(monkeypatch):
    """Every CheckpointModel of `compress` finds this many bytes free."""

    def give(nbytes):
        class Model(CheckpointModel):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs, free_memory=lambda device: nbytes)

        monkeypatch.setattr(pipeline, "CheckpointModel", Model)

    return give


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt-oss", "llama4"])
def test_a_block_runs_layer_by_layer(saved, family):
    whole = CheckpointModel(saved(family))
    apart = CheckpointModel(saved(family), free_memory=lambda device: 0)
    inputs, others = whole.block_inputs([IDS]), apart.block_inputs([IDS])
    block, seen = apart.load_block(0), []
    before = {name: tensor.clone() for name, tensor in apart.block_tensors(0).items()}
    leaves = [m for m in block.modules() if list(m.parameters(recurse=False))]

    def count(module, args, output):
        seen.append(sum(next(m.parameters(recurse=False)).is_meta for m in leaves))

    handles = [m.register_forward_hook(count) for m in leaves]
    got = apart.forward_block(0, others.hidden[0], others.kwargs[0][0])
    for handle in handles:
        handle.remove()
    assert len(seen) >= len(leaves) - 1 and min(seen) >= len(leaves) - 2
    whole.load_block(0)
    assert torch.equal(got, whole.forward_block(0, inputs.hidden[0], inputs.kwargs[0][0]))
    after = apart.block_tensors(0)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert 0 in apart.offloaded and not whole.offloaded


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("recipe", ["int4-gptq", "wanda-0.5"])
def test_the_result_is_the_same_and_said(saved, tmp_path, little, family, recipe):
    report = gp.compress(saved(family), tmp_path / "want", recipe, calibration=IDS)
    assert not [note for note in report.notes if "accelerate" in note]
    little(10_000)
    report = gp.compress(saved(family), tmp_path / "got", recipe, calibration=IDS, heldout=IDS[:2])
    got, want = (load_file(tmp_path / x / "model.safetensors") for x in ("got", "want"))
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    (note,) = [note for note in report.notes if "accelerate" in note]
    assert note.startswith("model.layers.0 and 2 more: at most ") and "10000 free" in note


def test_what_fits_is_not_split(saved, tmp_path, little):
    """The bytes of a block are those of its weights and, where it is calibrated, its Hessians."""
    model = CheckpointModel(saved("llama"), free_memory=lambda device: 0)
    model.load_block(0)
    taken, free = model.offloaded[0]
    numbers = sum(tensor.numel() for tensor in model.block_tensors(0).values())
    assert (taken, free) == (4 * numbers, 0)
    model = CheckpointModel(saved("llama"), calibrated=True, free_memory=lambda device: 0)
    model.load_block(0)
    hessians = 4 * (6 * 64**2 + 128**2)
    assert model.offloaded[0][0] == taken + hessians
    little(taken + hessians)
    report = gp.compress(saved("llama"), tmp_path / "out", "int4-gptq", calibration=IDS)
    assert not [note for note in report.notes if "accelerate" in note]


def test_folds_need_the_block_whole(saved, tmp_path, little):
    little(0)
    with pytest.raises(CheckpointError, match="model.layers.0: takes .* steps that fold need it"):
        gp.compress(saved("llama"), tmp_path / "out", "smoothquant+w8a8", calibration=IDS)
    assert not (tmp_path / "out").exists()


def test_free_memory_of_a_device(monkeypatch):
    class Module:
        @staticmethod
        def mem_get_info(device):
            return 7, 9

    assert offload.free_memory(torch.device("cpu")) is None
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    assert offload.free_memory(torch.device("cuda", 0)) == 7
    monkeypatch.setattr(torch, "get_device_module", lambda device: object())
    assert offload.free_memory(torch.device("mps")) is None
    assert checkpoint_model.CheckpointModel.__init__.__kwdefaults__["free_memory"] is (
        offload.free_memory
    )
