"""The teacher's predictions on disk: its most likely tokens, and the others as one sum."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lrcompress.layers.model_state import evaluation_mode
from lrcompress.runtime.atomic_io import replace_tensors, writing_state
from lrcompress.runtime.progress import Progress, silent

# sequences in a file; an interruption loses at most the work for one file
CHUNK_SIZE = 16
# keys of the tensors in a file
IDS, LOG_PROBS = "teacher_ids", "teacher_log_probs"


class TeacherCache:
    """A folder of files with the predictions for `CHUNK_SIZE` sequences each, every file complete.

    For every position except the last of a sequence a file holds `teacher_ids` (k,), the most
    likely tokens, and `teacher_log_probs` (k + 1,), whose last entry is that of all other tokens
    together, at `temperature`. k is `top_k`, or the size of the vocabulary minus 1 if that is less.
    With `autocast` the teacher runs in bfloat16, as it does in a run without a cache.
    """

    def __init__(self, folder: Path, top_k: int, temperature: float, autocast: bool) -> None:
        self.folder, self.top_k, self.temperature = folder, top_k, temperature
        self.autocast = autocast

    def missing_chunks(self, sequences: int) -> list[int]:
        """The numbers of the files that are not written yet, for so many sequences in all."""
        chunk_count = -(-sequences // CHUNK_SIZE)
        return [chunk for chunk in range(chunk_count) if not self._file(chunk).is_file()]

    @torch.no_grad()
    def fill(
        self, teacher: Any, tokens: Tensor, chunks: Iterable[int], progress: Progress = silent
    ) -> None:
        """Writes the files `chunks` for tokens (sequences, length).

        Raises MachineError on a full disk.
        """
        todo = list(chunks)
        precision = torch.autocast(teacher.device.type, torch.bfloat16, enabled=self.autocast)
        with evaluation_mode(teacher), precision:
            for chunk in progress(todo, "Teacher", len(todo)):
                blocks = tokens[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE]
                predictions = [self._predict(teacher, block) for block in blocks]
                stacked = {
                    key: torch.stack([prediction[key] for prediction in predictions])
                    for key in (IDS, LOG_PROBS)
                }
                with writing_state(f"the teacher's predictions in {str(self.folder)!r}"):
                    replace_tensors(self._file(chunk), stacked)

    def read(self, sequence: int) -> dict[str, Tensor]:
        """The predictions for one sequence: (length - 1, k) ids, (length - 1, k + 1) log-probs."""
        chunk, row = divmod(sequence, CHUNK_SIZE)
        with safe_open(self._file(chunk), "pt") as stored:  # type: ignore[no-untyped-call,unused-ignore]
            return {key: stored.get_slice(key)[row] for key in (IDS, LOG_PROBS)}

    def _predict(self, teacher: Any, block: Tensor) -> dict[str, Tensor]:
        logits = teacher(input_ids=block[None].to(teacher.device), use_cache=False).logits[0, :-1]
        log_probs = (logits.float() / self.temperature).log_softmax(-1)
        top = log_probs.topk(min(self.top_k, log_probs.shape[-1] - 1))
        top_and_others = [top.values, log_prob_of_others(log_probs, top.indices)]
        return {
            IDS: top.indices.int().cpu(),
            LOG_PROBS: torch.cat(top_and_others, dim=-1).cpu(),
        }

    def _file(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06}.safetensors"


def log_prob_of_others(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probability (..., 1) of all tokens except `ids` (..., k) together.

    `log_probs` (..., vocabulary). Adds up the other tokens: 1 minus the sum of the top tokens would
    lose precision where that sum is close to 1.
    """
    return log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
