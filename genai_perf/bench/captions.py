"""What the numbers of a side-by-side report mean, in words: the captions of the page."""

from .machine import Machine

# Models below this many parameters spend most of decoding outside of their matmuls.
SMALL = 100_000_000


def captions(amounts: dict, parameters: int) -> dict[str, str]:
    """One text for each part of the page.

    Args:
        amounts: the settings that the report holds, counts as they came out.
        parameters: of the model.
    """
    window, steps, side = amounts["window"], amounts["decode_steps"], amounts["layer_features"]
    rounds = amounts["rounds"]
    turns = (
        "in each round every variant has its turn"
        if amounts["together"]
        else "each variant takes turns with the original, since all together do not fit into memory"
    )
    overhead = (
        " In a model this small most of the time of decoding goes into Python and framework calls, "
        "which compression does not change; the layer below shows the kernels where the weights "
        "are large."
        if parameters < SMALL
        else ""
    )
    evaluated = (
        f"{amounts['eval_windows']} windows of {window} tokens: {amounts['evaluation_source']}"
    )
    return {
        "bytes_on_disk": "Weights on disk are the *.safetensors files that hold them. Embeddings "
        "and norms stay in the checkpoint's type, and pruned weights are stored as zeros, so a "
        "sparse variant is as large as the original.",
        "peak_rss": "Peak memory is the most that stayed resident in a process of its own that "
        f"loads the variant, evaluates one window of {window} tokens and generates {steps}; "
        "Python, torch and transformers, imported before it starts, are in it. The last column "
        "leaves out what was resident before the model was loaded.",
        "perplexity": f"Perplexity, exp of the mean loss per token, over {evaluated}.",
        "speed": f"Prefill is one prompt of {window} tokens; decode is {steps} greedy tokens after "
        "it, one at a time from the cache, batch 1. All variants compute in float32; compressed "
        f"layers run from their packed bytes. Medians of {rounds['prefill']} and "
        f"{rounds['decode']} rounds; {turns}, and the ratio is formed within the round.{overhead}",
        "layer": f"Time of one call of y = x Wᵀ, W {side} × {side}, from packed bytes, x float32, "
        f"against dense float32. Medians of up to {amounts['layer_rounds']} rounds, all formats in "
        "turn. With 1 row, as in generating one sequence, reading the weights takes most of the "
        "time; with many rows, as in a prompt, the arithmetic does, and decoding the packed "
        "weights comes on top.",
        "calibration": f"{amounts['calibration_windows']} windows of {window} tokens: "
        f"{amounts['calibration_source']}; the round-to-nearest recipes (rtn) need none",
        "evaluation": evaluated,
    }


def busy_warning(host: Machine) -> str | None:
    """A warning where others were at work on the machine when the measurement began."""
    if host.cores_busy < 0.5:
        return None
    return (f"This machine was busy with other work: {host.cores_busy:.1f} of its "
            f"{host.cores_usable} cores when the run began. The speeds are less certain than on a "
            "quiet one; their intervals say how much.")  # fmt: skip
