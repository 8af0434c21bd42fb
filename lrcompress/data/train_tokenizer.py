"""A tokenizer of a text's own: byte-level BPE, trained by the tokenizers library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lrcompress.data.corpora import Corpus
from lrcompress.runtime.errors import InputError

END = "<|endoftext|>"
# characters read of each text: merges of so few tokens need no more
ENOUGH = 8_000_000


def train_tokenizer(corpora: Iterable[Corpus], vocab_size: int) -> Any:
    """A transformers tokenizer of `vocab_size` tokens; END stands between documents.

    Raises InputError where the texts are too small to have that many.
    """
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator(_some(corpora), trainer)
    if bare.get_vocab_size() < vocab_size:
        raise InputError(
            f"the text gives a tokenizer of {bare.get_vocab_size()} tokens, not {vocab_size}: "
            "give more text, or a smaller --vocab-size"
        )
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=END, pad_token=END)


def _some(corpora: Iterable[Corpus]) -> Iterator[str]:
    for corpus in corpora:
        left = ENOUGH
        for document in corpus.documents:
            yield document[:left]
            left -= len(document)
            if left <= 0:
                break
