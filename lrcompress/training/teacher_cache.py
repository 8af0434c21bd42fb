"""The teacher's predictions on disk: its likeliest tokens and the exact weight of the others."""

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

# sequences in a file: what an interruption loses
CHUNK = 16
IDS, LOG_PROBS = "teacher_ids", "teacher_log_probs"


class TeacherCache:
    """Files of `CHUNK` sequences; a file that is there is whole.

    For every position but the last of a sequence: `teacher_ids` (k,) and `teacher_log_probs`
    (k + 1,), the last of them that of all other tokens together, at the temperature given. The
    teacher's products are in bfloat16 with `autocast`, as they are in a run that has no cache.
    """

    def __init__(self, folder: Path, top_k: int, temperature: float, autocast: bool) -> None:
        self.folder, self.top_k, self.temperature = folder, top_k, temperature
        self.autocast = autocast

    def missing(self, sequences: int) -> list[int]:
        """Numbers of the files that are still to be made."""
        return [n for n in range(-(-sequences // CHUNK)) if not self._file(n).is_file()]

    @torch.no_grad()
    def fill(
        self, teacher: Any, tokens: Tensor, chunks: Iterable[int], progress: Progress = silent
    ) -> None:
        """Runs the teacher over tokens (sequences, length). Raises MachineError on a full disk."""
        wanted = list(chunks)
        precision = torch.autocast(teacher.device.type, torch.bfloat16, enabled=self.autocast)
        with evaluation_mode(teacher), precision:
            for number in progress(wanted, "Teacher", len(wanted)):
                blocks = tokens[number * CHUNK : (number + 1) * CHUNK]
                found = [self._predictions(teacher, block) for block in blocks]
                stacked = {key: torch.stack([f[key] for f in found]) for key in (IDS, LOG_PROBS)}
                with writing_state(f"the teacher's predictions in {str(self.folder)!r}"):
                    replace_tensors(self._file(number), stacked)

    def read(self, sequence: int) -> dict[str, Tensor]:
        """What was kept of one sequence."""
        number, row = divmod(sequence, CHUNK)
        with safe_open(self._file(number), "pt") as stored:  # type: ignore[no-untyped-call,unused-ignore]
            return {key: stored.get_slice(key)[row] for key in (IDS, LOG_PROBS)}

    def _predictions(self, teacher: Any, block: Tensor) -> dict[str, Tensor]:
        logits = teacher(input_ids=block[None].to(teacher.device), use_cache=False).logits[0, :-1]
        log_probs = (logits.float() / self.temperature).log_softmax(-1)
        top = log_probs.topk(min(self.top_k, log_probs.shape[-1] - 1))
        rest = others(log_probs, top.indices)
        kept = torch.cat([top.values, rest], dim=-1)
        return {IDS: top.indices.int().cpu(), LOG_PROBS: kept.cpu()}

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06}.safetensors"


def others(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probability (..., 1) of all tokens but `ids` (..., k), without cancellation."""
    return log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
