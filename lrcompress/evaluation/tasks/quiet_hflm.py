"""lm-eval's wrapper of a Hugging Face model, with one progress bar for all texts of a task.

Importing this module imports lm-eval's model code, which takes seconds: import it where it is used.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor

from lrcompress.layers.token_ids import check_token_ids
from lrcompress.runtime.progress import Progress


class QuietHFLM(HFLM):  # type: ignore[misc]
    """HFLM that shows progress per text, and refuses tokens that the model has no embedding for."""

    def __init__(self, progress: Progress, **options: Any) -> None:
        super().__init__(**options)
        self.text_progress = progress

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        is_quiet = disable_tqdm or override_bs is not None
        return super()._loglikelihood_tokens(requests, is_quiet, override_bs)

    def _model_call(self, inps: Tensor, *args: Any, **options: Any) -> Any:
        check_token_ids(self.model, inps)
        return super()._model_call(inps, *args, **options)

    def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Any:
        check_token_ids(self.model, context)
        return super()._model_generate(context, *args, **options)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Scores the texts one by one, so that the answer to each is cached as soon as it is known.

        With a batch size above 1, a batch mixes windows of several texts, so all texts go to
        lm-eval at once.
        """
        score_texts = super().loglikelihood_rolling
        if self.batch_size != 1:
            return score_texts(requests, disable_tqdm)
        texts = self.text_progress(requests, "texts of a task")
        return [score for text in texts for score in score_texts([text], True)]
