"""From a teacher's folder and a text to a TeacherCache."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .._checks import check_positive, fail
from .._errors import CheckpointError
from ..compression import calibration
from ..distill.cache import Identity, TeacherCache, text_hash, vocabulary_hash, write_cache
from .heads import top_k_of

_ENDS = 1 << 20  # bytes hashed at either end of a weight file, with its length


def load(path: str | Path, *, dtype: torch.dtype = torch.float32):
    """(model, tokenizer) of a checkpoint folder; nothing is downloaded, no code of it is run.

    Raises:
        CheckpointError: there is no such folder, or transformers cannot read it.
    """
    import transformers

    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: is no checkpoint folder: it has no config.json")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())[:300]}") from error
    return model.eval(), tokenizer


def checkpoint_hash(path: str | Path) -> str:
    """Of config and weights: of a weight file its length and both ends."""
    digest = hashlib.sha256((Path(path) / "config.json").read_bytes())
    for file in sorted(Path(path).glob("*.safetensors")):
        size = file.stat().st_size
        with open(file, "rb") as stream:
            digest.update(f"{file.name} {size}".encode() + stream.read(_ENDS))
            stream.seek(max(0, size - _ENDS))
            digest.update(stream.read(_ENDS))
    return digest.hexdigest()


def text_windows(texts: Sequence[str], tokenizer, seqlen: int, limit: int | None = None
                 ) -> torch.Tensor:  # fmt: skip
    """All of the texts in windows (n, seqlen) of int64 ids; with `limit` the first so many."""
    found = calibration.windows(
        texts, lambda one: tokenizer(one, verbose=False).input_ids, max_seqlen=seqlen,
        n_samples=1 << 62, vocab_size=len(tokenizer),
    )  # fmt: skip
    return found[:limit]


def cache_teacher(
    teacher: str | Path,
    texts: Sequence[str],
    out: str | Path,
    *,
    top_k: int = 64,
    seqlen: int = 512,
    temperature: float = 1.0,
    limit: int | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherCache:
    """Run a teacher over a text once and keep its top-k log-probabilities.

    Args:
        teacher: checkpoint folder.
        texts: joined and cut every `seqlen` tokens; what is left at the end is left out.
        out: folder; new, or an interrupted cache of the same teacher, text and numbers, which goes
            on where it stopped.
        top_k: tokens kept at each position, 6 bytes each.
        seqlen: tokens in a window.
        temperature: of the teacher's softmax; the loss has to be at the same one.
        limit: windows at most.
        batch: windows a call of the teacher.
        progress: called with (windows done, windows in all).

    Raises:
        CheckpointError: a teacher that cannot be read, or `out` is of something else.
        CalibrationError: too little text for a window.
    """
    check_positive("cache_teacher", top_k=top_k, seqlen=seqlen, temperature=temperature)
    model, tokenizer = load(teacher)
    windows = text_windows(texts, tokenizer, seqlen, limit)
    vocab = min(len(tokenizer), model.get_output_embeddings().weight.shape[0])
    if top_k > vocab:
        fail("cache_teacher", "top_k", f"at most {vocab}, the vocabulary", top_k)
    identity = Identity(
        checkpoint_hash(teacher), vocabulary_hash(tokenizer.get_vocab()), text_hash(windows), vocab,
        top_k, temperature, *windows.shape,
    )  # fmt: skip

    def kept(ids: torch.Tensor):
        return top_k_of(model, ids, top_k, temperature=temperature, vocab_size=vocab)

    return write_cache(out, windows, kept, identity, batch=batch, progress=progress)
