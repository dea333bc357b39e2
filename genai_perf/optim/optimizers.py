"""torch.optim.Optimizer over ops/optimizer_step: the state of each parameter, and its loading."""

import torch

from .._checks import check_choice, fail
from ..formats.base import ceil_div
from ..formats.code_book import BLOCK_SIZES
from ..formats.dynamic_map import encode_blocks
from ..ops.optimizer_step import adamw_step, lion_step


class _Optimizer8bit(torch.optim.Optimizer):
    """What AdamW8bit and Lion8bit share. `MOMENTS` names the moments and says which are signed."""

    MOMENTS: dict[str, bool] = {}

    def __init__(self, params, *, lr, betas, weight_decay, block_size, min_8bit_size, **rest):
        name = type(self).__name__
        for option, value in {"lr": lr, "weight_decay": weight_decay, **rest}.items():
            if not value >= 0:
                fail(name, option, "0 or more", value)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            fail(name, "betas", "two numbers in [0, 1)", betas)
        check_choice(name, "block_size", block_size, BLOCK_SIZES)
        if min_8bit_size < 0:
            fail(name, "min_8bit_size", "0 or more", min_8bit_size)
        self.block_size, self.min_8bit_size = block_size, min_8bit_size
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, **rest})

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all parameters with a gradient.

        Raises:
            ValueError: a gradient that is not finite (on a CPU); it names the parameter, which and
                those after it are left as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, (group, p) in enumerate((g, p) for g in self.param_groups for p in g["params"]):
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                fail(type(self).__name__, f"gradient of parameter {number}", "dense", "sparse")
            local, grad = _local(p), _local(p.grad)
            if not self.state[p]:
                self.state[p] = self._fresh(local)
            state = self.state[p]
            state["step"] += 1
            try:
                self._update(local, grad, state, group)
            except ValueError as error:
                state["step"] -= 1
                at = f"parameter {number} of shape {tuple(p.shape)}"
                raise ValueError(f"{type(self).__name__}: {at}: {error}") from error
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, for what `state_dict` of this class gave, or torch.optim.AdamW's: then fp32
        moments of parameters with `min_8bit_size` elements or more are quantized.

        Raises:
            ValueError: moments of another shape, or made with another block_size.
        """
        # torch would cast the codes to the parameter's dtype, so it gets no state to cast.
        bare = {"state": {}, "param_groups": state_dict["param_groups"]}
        super().load_state_dict(bare)
        params = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        loaded = {}
        for number, p in zip(numbers, params, strict=True):
            if state := state_dict["state"].get(number):
                loaded[p] = self._adopt(number, _local(p), state)
        self.state.update(loaded)

    def _in_8bit(self, p: torch.Tensor) -> bool:
        return p.numel() >= self.min_8bit_size

    def _fresh(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        zeros = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        state = {"step": torch.tensor(0.0)}
        return state | {k: v for name in self.MOMENTS for k, v in self._held(name, zeros).items()}

    def _held(self, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """fp32 values of a moment as they are kept."""
        if not self._in_8bit(values):
            return {name: values.clone()}
        codes, absmax = encode_blocks(values.reshape(-1), self.block_size, self.MOMENTS[name])
        return {name: codes.view(values.shape), f"{name}_scale": absmax}

    def _adopt(self, number: int, p: torch.Tensor, state: dict) -> dict[str, torch.Tensor]:
        what = f"{type(self).__name__}.load_state_dict: state of parameter {number}"
        adopted = {"step": torch.tensor(float(state["step"]))}
        for name in self.MOMENTS:
            if name not in state or state[name].shape != p.shape:
                got = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"{what}: {name} must have shape {tuple(p.shape)}, got {got}")
            moment, scale = state[name].to(p.device), state.get(f"{name}_scale")
            if scale is None:
                adopted |= self._held(name, moment.float())
                continue
            blocks = ceil_div(p.numel(), self.block_size)
            if moment.dtype != torch.uint8 or scale.shape != (blocks,):
                want = f"uint8 with {blocks} scales (block_size {self.block_size})"
                got = f"{moment.dtype} with {scale.numel()}"
                raise ValueError(f"{what}: {name} must be {want}, got {got}")
            adopted |= {name: moment.clone(), f"{name}_scale": scale.to(p.device).clone()}
        return adopted


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a distributed tensor (FSDP2), or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class AdamW8bit(_Optimizer8bit):
    """AdamW with both moments in 8 bits: 2.03 bytes of state a parameter instead of 8.

    Drop-in for torch.optim.AdamW. Under FSDP2 each rank holds the state of its shard, in plain
    tensors.

    Args:
        params: parameters or groups of them; fp32, bf16 or fp16.
        lr, betas, eps, weight_decay: as torch.optim.AdamW.
        block_size: consecutive elements that share a scale, a power of two from 32 to 4096.
        min_8bit_size: smaller parameters, such as norms, keep moments in fp32.

    Raises:
        ValueError: an option out of its range.

    Source: 8-Bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
    """

    MOMENTS = {"exp_avg": True, "exp_avg_sq": False}

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 1e-2, *, block_size: int = 256,
                 min_8bit_size: int = 4096):  # fmt: skip
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                         block_size=block_size, min_8bit_size=min_8bit_size)  # fmt: skip

    def _update(self, p, grad, state, group) -> None:
        adamw_step(p, grad, state["exp_avg"], state["exp_avg_sq"], state.get("exp_avg_scale"),
                   state.get("exp_avg_sq_scale"), step=int(state["step"]), lr=float(group["lr"]),
                   betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"],
                   block_size=self.block_size)  # fmt: skip


class Lion8bit(_Optimizer8bit):
    """Lion with its moment in 8 bits: 1.02 bytes of state a parameter.

    Args:
        params: parameters or groups of them; fp32, bf16 or fp16.
        lr: a third to a tenth of AdamW's.
        betas, weight_decay: as the paper's.
        block_size, min_8bit_size: as AdamW8bit.

    Raises:
        ValueError: an option out of its range.

    Source: Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675, algorithm 2.
    """

    MOMENTS = {"exp_avg": True}

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0, *, block_size: int = 256,
                 min_8bit_size: int = 4096):  # fmt: skip
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay,
                         block_size=block_size, min_8bit_size=min_8bit_size)  # fmt: skip

    def _update(self, p, grad, state, group) -> None:
        lion_step(p, grad, state["exp_avg"], state.get("exp_avg_scale"), lr=float(group["lr"]),
                  betas=group["betas"], weight_decay=group["weight_decay"],
                  block_size=self.block_size)  # fmt: skip
