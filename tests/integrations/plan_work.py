"""What the training plan's test runs, each in a process of its own."""

import ctypes

import torch

from genai_perf.integrations.plan_train import _freeze


def _kilobytes(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))


def train(src: str, batch: int, seqlen: int, dtype: str, gradient_checkpointing: bool,
          lora_rank: int | None, autocast: bool) -> int:  # fmt: skip
    """Peak bytes of a training step: weights and states, and what resident memory grows by."""
    import transformers

    # Freed memory goes back at once, so that what is resident is what is alive.
    libc = ctypes.CDLL(None)
    for option, value in ((-3, 1 << 16), (-1, 0)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(option, value)
    torch.set_num_threads(1)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(src, dtype=types[dtype])
    if lora_rank is not None:
        _freeze(model, model.model.layers, lora_rank)
    model.train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora_rank is not None:
            model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)

    def step(rows, columns):
        ids = torch.zeros(rows, columns, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(1, 8)  # states, and what libraries set up once
    libc.malloc_trim(0)
    states = [t for state in optimizer.state.values() for t in state.values()]
    kept = sum(t.nbytes for t in (*model.parameters(), *states))
    before = _kilobytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")  # resets VmHWM
    step(batch, seqlen)
    return kept + (_kilobytes("VmHWM") - before) * 1024
