"""Tiny checkpoints of lrcompress with random weights, and what transformers computes with them.

`python -m tests.serving.tiny_checkpoints OUT` writes all that the tests of the vLLM plug-in need.
They run in another environment, because vLLM and lrcompress want different transformers.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

import lrcompress
from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.lowrank import PivotedLinear, rebuild
from lrcompress.methods.types import LinearSpec
from tests import tiny
from tests.serving.damage import READ_FROM_CONFIG, SEEN_IN_FILES, SEEN_IN_THE_MODEL
from tests.tiny import FAMILIES, byte_tokenizer, tiny_model

Records = dict[str, dict[str, Any]]

# heads of 32 channels: vLLM's attention on CPUs has no smaller ones
WIDTH, HEADS, KEY_HEADS, HEAD_DIM, BLOCKS = 128, 4, 2, 32, 4
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "n_embd": WIDTH,
    "d_model": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_DIM,
    "rotary_dim": HEAD_DIM,
    "num_hidden_layers": BLOCKS,
    "n_layer": BLOCKS,
    "n_layers": BLOCKS,
    "num_layers": BLOCKS,
    "attention_types": [[["global", "local"], BLOCKS // 2]],
    "global_head_dim": HEAD_DIM,
    # the width of the states of a mamba is that of its heads together, 2 x hidden_size
    "mamba_d_head": HEAD_DIM,
    "mamba_d_ssm": 2 * WIDTH,
}
# every family has them; without, some have ends of text that the vocabulary has not
SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}

# block -> (width, form of each role); None is the dense width, and roles without a form are dense
# or narrowed
Plan = tuple[tuple[int | None, dict[str, str]], ...]
PLAN: Plan = (
    (56, {}),
    (56, {"gate": "factored", "up": "pivoted", "gate_up": "pivoted", "down": "pivoted"}),
    (None, {"gate": "factored", "up": "factored", "gate_up": "factored", "down": "factored"}),
    (None, {"up": "pivoted"}),
)
RANKS = {"gate": 9, "up": 14, "gate_up": 11, "down": 13}


def records(linears: tuple[LinearSpec, ...], plan: Plan) -> Records:
    """The record of every linear that `plan` changes."""
    changed: Records = {}
    for linear in linears:
        width, forms = plan[linear.block]
        shape, form = _shape(linear, width), forms.get(linear.role)
        if form:
            changed[linear.name] = {"form": form, "rank": RANKS[linear.role], "shape": shape}
        elif shape != [linear.out_features, linear.in_features]:
            changed[linear.name] = {"form": "narrowed", "shape": shape}
    return changed


def _shape(linear: LinearSpec, width: int | None) -> list[int]:
    if width is None:
        return [linear.out_features, linear.in_features]
    if linear.role == "down":
        return [linear.out_features, width]
    return [2 * width if linear.role == "gate_up" else width, linear.in_features]


def random_checkpoint(out: Path, family: str = "llama", plan: Plan = PLAN, **changes: Any) -> Any:
    """Saves a model of `family` whose FFNs follow `plan`, and returns it."""
    model = small_model(family, **changes)
    return save_random(out, model, records(find_ffns(model).linears, plan))


def small_model(family: str = "llama", **changes: Any) -> Any:
    """A dense model that vLLM can run, with `changes` of its config."""
    keys = FAMILIES[family]
    sizes = {key: size for key, size in SIZES.items() if key in keys}
    return tiny_model(family, **(sizes | _per_block(keys) | SPECIAL_TOKENS | changes))


def _per_block(keys: dict[str, Any]) -> dict[str, Any]:
    """Lists with a value for each block of tests/tiny.py, repeated for the blocks here."""
    lists = {key: values for key, values in keys.items() if isinstance(values, list)}
    return {
        key: values * (BLOCKS // len(values))
        for key, values in lists.items()
        if len(values) == tiny.BLOCKS
    }


def save_random(out: Path, model: Any, changed: Records) -> Any:
    """Saves `model` with the linears `changed`, whose weights are random, and returns it."""
    rebuild(model, changed)
    torch.manual_seed(3)
    for name in changed:
        layer = model.get_submodule(name)
        for parameter in layer.parameters():
            parameter.detach().normal_(0, 0.3)
        if isinstance(layer, PivotedLinear):
            layer.order.copy_(torch.randperm(layer.in_features))
    lrcompress.save(model, out, byte_tokenizer())
    return model


def attention_records() -> Records:
    """Low-rank linears of attention; the value is dense."""
    linears: Records = {
        "q_proj": {"form": "factored", "rank": 20, "shape": [WIDTH, WIDTH]},
        "k_proj": {"form": "pivoted", "rank": 12, "shape": [KEY_HEADS * HEAD_DIM, WIDTH]},
        "o_proj": {"form": "pivoted", "rank": 18, "shape": [WIDTH, WIDTH]},
    }
    return {f"model.layers.1.self_attn.{name}": record for name, record in linears.items()}


EXPERT = "model.layers.0.mlp.experts.ffns.1.down"
EXPERT_RECORD = {"form": "factored", "rank": 4, "shape": [32, 24]}

PROMPT = torch.randint(1, 257, (40,), generator=torch.Generator().manual_seed(1)).tolist()
NEW_TOKENS = 16


def logprobs(model: Any) -> list[float]:
    """Log-probabilities of the tokens of PROMPT after the first."""
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    chosen = scores[:-1].gather(-1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    return list[float](chosen.tolist())


def expectation(model: Any) -> dict[str, Any]:
    """What vLLM has to compute, in float32 and with the errors that bfloat16 and float16 make."""
    exact = torch.tensor(logprobs(model))
    greedy = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    errors = {
        str(dtype).removeprefix("torch."): float(
            (torch.tensor(logprobs(model.to(dtype))) - exact).abs().mean()
        )
        for dtype in (torch.bfloat16, torch.float16)
    }
    return {
        "prompt": PROMPT,
        "logprobs": exact.tolist(),
        "greedy": greedy[0, len(PROMPT) :].tolist(),
        "mean_errors": errors,
    }


# families that vLLM 0.32 for CPUs does not build; of qwen3_5_text it knows the architecture
NOT_IN_VLLM = (
    "bamba",
    "codegen",
    "gpt_neo",
    "mpt",
    "openai-gpt",
    "qwen3_5_text",
    "recurrent_gemma",
    "xglm",
    "zamba",
)
# families whose log-probabilities differ in vLLM: refused
DIFFERENT_IN_VLLM = ("gemma3n_text",)
# without shared keys, which vLLM would believe of any config that has the number
EQUAL_HEADS = {"num_key_value_heads": HEADS}
# name of the folder -> family and changes of its config
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        family: (family, {})
        for family in FAMILIES
        if family not in (*NOT_IN_VLLM, *DIFFERENT_IN_VLLM)
    },
    "biogpt": ("biogpt", EQUAL_HEADS),
    "falcon": ("falcon", {"ffn_hidden_size": 4 * WIDTH}),  # vLLM knows no other
    "gpt_neox": ("gpt_neox", EQUAL_HEADS),
    "opt": ("opt", EQUAL_HEADS),
    "persimmon": ("persimmon", EQUAL_HEADS),
    "llama-biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
}


def write_all(out: Path) -> None:
    """Writes OUT/served/NAME with expected.json, and OUT/refused/NAME with refusal.txt."""
    for name, (family, changes) in SERVED.items():
        _write_served(out, name, random_checkpoint(out / "served" / name, family, **changes))
    name = "llama-attention"
    _write_served(out, name, save_random(out / "served" / name, small_model(), attention_records()))
    for damage, refusal in (READ_FROM_CONFIG | SEEN_IN_FILES | SEEN_IN_THE_MODEL).items():
        folder = shutil.copytree(out / "served" / "llama", out / "refused" / damage.__name__)
        damage(folder)
        (folder / "refusal.txt").write_text(refusal)
    for family in DIFFERENT_IN_VLLM:
        random_checkpoint(out / "refused" / family, family)
        (out / "refused" / family / "refusal.txt").write_text(f"{family} is not served")
    mixture = out / "refused" / "mixture"
    save_random(mixture, tiny_model("qwen3_moe"), {EXPERT: EXPERT_RECORD})
    (mixture / "refusal.txt").write_text(f"{EXPERT}: compressed experts are not served")


def _write_served(out: Path, name: str, model: Any) -> None:
    (out / "served" / name / "expected.json").write_text(json.dumps(expectation(model)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_all(Path(sys.argv[1]))
