"""Sentences that the user has to know beside a result: what was left out, and why."""

from __future__ import annotations

import logging
from functools import cache


@cache
def notice(sentence: str) -> None:
    """Shows `sentence` once in the life of the process, through the logger of lrcompress.

    Without a handler of the user's own, logging writes it to stderr.
    """
    logging.getLogger("lrcompress").warning(sentence)
