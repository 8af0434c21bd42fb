"""Trains a byte-level BPE tokenizer on texts, with the tokenizers library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lrcompress.data.corpora import Corpus
from lrcompress.runtime.errors import InputError

END_OF_TEXT = "<|endoftext|>"
# more text hardly changes the merges of a small vocabulary
MAX_CHARACTERS_PER_TEXT = 8_000_000


def train_tokenizer(corpora: Iterable[Corpus], vocab_size: int) -> Any:
    """A transformers tokenizer of `vocab_size` tokens, with END_OF_TEXT as EOS token.

    Raises InputError where the texts are too short for that many tokens.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_beginnings(corpora), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise InputError(
            f"the text gives a tokenizer of {tokenizer.get_vocab_size()} tokens, not {vocab_size}: "
            "give more text, or a smaller --vocab-size"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def _beginnings(corpora: Iterable[Corpus]) -> Iterator[str]:
    for corpus in corpora:
        remaining = MAX_CHARACTERS_PER_TEXT
        for document in corpus.documents:
            yield document[:remaining]
            remaining -= len(document)
            if remaining <= 0:
                break
