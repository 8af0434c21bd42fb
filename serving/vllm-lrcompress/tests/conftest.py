"""vLLM in this process, on one CPU thread, and checkpoints that lrcompress wrote.

`make test-serve` writes them below the folder that LRCOMPRESS_CHECKPOINTS names.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKPOINTS = Path(os.environ["LRCOMPRESS_CHECKPOINTS"])
os.environ |= {
    "VLLM_CACHE_ROOT": f"{CHECKPOINTS}-cache",  # not that of the user
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """An `LLM` that serves `folder` in float32 without torch.compile, unless `options` differ."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 2,
        "skip_tokenizer_init": True,
    }
    llm = None
    try:
        llm = LLM(str(folder), **(defaults | options))
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: Any, prompt: list[int], new_tokens: int) -> tuple[list[float], list[int]]:
    """Log-probabilities of the prompt's tokens after the first, and the greedy continuation."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=new_tokens,
        min_tokens=new_tokens,
        ignore_eos=True,
        temperature=0,
        prompt_logprobs=0,
        detokenize=False,
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
    scores = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    return [score[token].logprob for score, token in scores], list(output.outputs[0].token_ids)
