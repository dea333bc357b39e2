"""Text to tokens: the byte-level BPE tokenizer and the packing of documents into sequences."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS = "<|bos|>"
BOS_ID = 0
# A word, underscores included, with the space before it; one digit; a run of punctuation; and the
# white space of an indented line as one piece, so that a line break and its indent are one token.
PATTERN = r" ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_positions: int) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,
        "pad_token": BOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> list[np.ndarray]:
    """One uint16 array for each text, beginning with BOS."""
    return [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch(list(texts))]


def batches(
    documents: list[np.ndarray], *, batch: int, seqlen: int, seed: int, start: int
) -> Iterator[torch.Tensor]:
    """Endless training batches, int64 (batch, seqlen + 1), the same for the same seed.

    Every epoch shuffles the documents, joins them (BOS stands between two), cuts the row of tokens
    at a new offset and shuffles the pieces. `start` skips that many batches, for resuming.
    """
    step, epoch = 0, 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(documents))
        row = np.concatenate([documents[i] for i in order])[rng.integers(seqlen) :]
        pieces = len(row) // (seqlen + 1)
        row = row[: pieces * (seqlen + 1)].reshape(pieces, seqlen + 1)
        row = row[rng.permutation(pieces)].astype(np.int64)
        for i in range(0, pieces - batch + 1, batch):
            if step >= start:
                yield torch.from_numpy(row[i : i + batch])
            step += 1
        epoch += 1


def held_out_batches(documents: list[np.ndarray], *, batch: int, seqlen: int) -> list[torch.Tensor]:
    """The joined documents in order, cut into pieces of seqlen + 1 that overlap by one token."""
    row = torch.from_numpy(np.concatenate(documents).astype(np.int64))
    return list(row.unfold(0, seqlen + 1, seqlen).split(batch))


def unigram_entropy(train: list[np.ndarray], held_out: list[np.ndarray], vocab_size: int) -> float:
    """Nats per token of the held-out text under the training text's frequencies (plus one)."""
    counts = np.bincount(np.concatenate(train), minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[np.concatenate(held_out)].mean())
