"""Prompts of lm-eval tasks that do not fit the context: lm-eval cuts off their beginning."""

from __future__ import annotations

from typing import Any

from lrcompress.runtime.errors import InputError

# tokens that a tokenizer may add to a text: BOS, EOS, and a space in front
ADDED_TOKENS = 3


def cut_prompts(lm: Any, task: Any) -> int:
    """The number of questions of `task`, whose requests are built, of which lm-eval cuts a prompt.

    `lm` is an HFLM. Raises InputError where the context has no room for an answer.
    """
    return len({request.doc_id for request in task.instances if _is_cut(lm, request)})


def _is_cut(lm: Any, request: Any) -> bool:
    if request.request_type == "generate_until":
        prompt, options = request.args
        return _exceeds(lm, prompt, _room_for_prompt(lm, options))
    if request.request_type != "loglikelihood":
        return False  # a text is read in windows, and nothing is cut
    prompt, answer = request.args
    # the last token of the answer is predicted and not read
    if not _may_exceed(prompt + answer, lm.max_length + 1):
        return False
    prompt_tokens, answer_tokens = _encode_pair(lm, prompt, answer)
    if answer_tokens > lm.max_length:
        raise _no_room(lm, f"an answer of {answer_tokens} tokens")
    return bool(prompt_tokens + answer_tokens > lm.max_length + 1)


def _encode_pair(lm: Any, prompt: str, answer: str) -> tuple[int, int]:
    """Tokens of the prompt and of the answer, as lm-eval counts them."""
    if not prompt:
        return 1, len(lm.tok_encode(answer, add_special_tokens=False))
    prompt_ids, answer_ids = lm._encode_pair(prompt, answer)
    return len(prompt_ids), len(answer_ids)


def _room_for_prompt(lm: Any, options: dict[str, Any]) -> int:
    """Tokens of the context that are not reserved for the answer."""
    from lm_eval.models.utils import normalize_gen_kwargs

    reserved = normalize_gen_kwargs(options, lm.max_gen_toks)["max_gen_toks"]
    if reserved >= lm.max_length:
        raise _no_room(lm, f"answers of up to {reserved} tokens")
    return int(lm.max_length - reserved)


def _exceeds(lm: Any, text: str, tokens: int) -> bool:
    return _may_exceed(text, tokens) and len(lm.tok_encode(text)) > tokens


def _may_exceed(text: str, tokens: int) -> bool:
    """Whether `text` can have more than so many `tokens`: each stands for a byte or more."""
    return len(text.encode("utf-8", "replace")) + ADDED_TOKENS > tokens


def _no_room(lm: Any, answer: str) -> InputError:
    return InputError(
        f"{answer} leave no room for the question in a context of {lm.max_length} tokens: give a "
        "larger --context-length, leave the task out, or measure a model with a longer context"
    )
