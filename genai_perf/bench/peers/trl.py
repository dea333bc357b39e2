"""TRL's ChunkedDivergenceFunction, the loss of its distillation trainer: on a processor its path
without Triton."""

from ..problem import Problem, Unsupported, Variant
from ..suites.distill_loss import variant as loss_variant

MODULE = "trl"
DEVICES = ("cpu", "cuda")
VARIANTS = {"trl": ("distill_loss",)}


def build(variant: str, problem: Problem) -> Variant:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    given = problem.inputs
    if "th" not in given:
        raise Unsupported("its fused distillation takes the teacher's hidden states and head")

    def loss(h, w):
        per_token, _ = ChunkedDivergenceFunction.apply(h, w, None, given["th"], given["tw"], None,
                                                       0.0)  # fmt: skip
        return per_token.mean()

    return loss_variant(problem, loss)
