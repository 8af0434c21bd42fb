"""Tiny random models of every family, a byte tokenizer, and helpers that use both."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WIDTH, INNER, BLOCKS, HEADS, LENGTH = 32, 88, 2, 4, 256

STANDARD = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {
    "n_embd": WIDTH,
    "n_layer": BLOCKS,
    "n_head": HEADS,
    "n_positions": LENGTH,
    "n_inner": INNER,
}

MAMBA = {
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
PER_LAYER_INPUTS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 32,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 257,
}

# model type -> config keys; one row a family
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": STANDARD,
    "mistral": STANDARD,
    "qwen2": STANDARD,
    "qwen3": STANDARD,
    "gemma": STANDARD,
    "gemma2": STANDARD,
    "gemma3_text": STANDARD,
    "granite": STANDARD,
    "smollm3": STANDARD,
    "olmo2": STANDARD,
    "olmo3": STANDARD,
    "stablelm": STANDARD,
    "cohere": STANDARD,
    "helium": STANDARD,
    "exaone4": STANDARD,
    "ernie4_5": STANDARD,
    "phi3": STANDARD,
    "glm4": STANDARD,
    "nemotron": STANDARD,
    "phi": STANDARD,
    "gpt2": GPT2,
    "openai-gpt": {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": LENGTH},
    "gpt_neo": {
        "hidden_size": WIDTH,
        "num_layers": BLOCKS,
        "num_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": LENGTH,
        "attention_types": [[["global", "local"], 1]],
    },
    "starcoder2": STANDARD,
    "gptj": GPT2 | {"rotary_dim": 8},
    "codegen": GPT2 | {"rotary_dim": 8},
    "gpt_neox": STANDARD,
    "bloom": {"hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": HEADS},
    "falcon": {
        "hidden_size": WIDTH,
        "ffn_hidden_size": INNER,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
    },
    "persimmon": STANDARD,
    "opt": STANDARD | {"ffn_dim": INNER, "word_embed_proj_dim": WIDTH},
    "xglm": {
        "d_model": WIDTH,
        "ffn_dim": INNER,
        "num_layers": BLOCKS,
        "attention_heads": HEADS,
        "max_position_embeddings": LENGTH,
    },
    "biogpt": STANDARD,
    "mpt": {"d_model": WIDTH, "n_layers": BLOCKS, "n_heads": HEADS, "max_seq_len": LENGTH},
    "lfm2": STANDARD
    | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": STANDARD | MAMBA | {"mamba_d_ssm": 64},
    "bamba": STANDARD | MAMBA | {"attn_layer_indices": [1]},
    "recurrent_gemma": STANDARD
    | {"block_types": ["recurrent", "attention"], "lru_width": WIDTH, "attention_window_size": 32},
    "qwen3_5_text": STANDARD | LINEAR_ATTENTION,
    "gemma3n_text": STANDARD
    | PER_LAYER_INPUTS
    | {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0]},
    # its second and fourth block share one FFN
    "zamba": STANDARD
    | {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": HEADS}
    | {"mamba_d_state": 8, "mamba_dt_rank": 8, "n_mamba_heads": 2}
    | {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16},
    "gemma4_text": STANDARD | PER_LAYER_INPUTS | {"global_head_dim": 8},
}


EXPERTS = 4
MIXTURE = STANDARD | {
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
# families with experts; glm4_moe and jamba have dense FFNs in other blocks, nemotron_h none
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": MIXTURE,
    "qwen3_moe": MIXTURE,
    "olmoe": MIXTURE,
    "qwen2_moe": MIXTURE | {"shared_expert_intermediate_size": 40},
    "glm4_moe": MIXTURE
    | {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "granitemoe": MIXTURE,
    "granitemoehybrid": MIXTURE
    | MAMBA
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 40},
    "jamba": MIXTURE
    | {"mamba_d_state": 8, "mamba_dt_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "expert_layer_offset": 1},
    "nemotron_h": MIXTURE
    | {"layers_block_type": ["mamba", "mlp", "attention", "moe"], "num_hidden_layers": 4}
    | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1}
    | {"chunk_size": 16, "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1}
    | {"moe_shared_expert_intermediate_size": 40},
}

# blocks 1 and 3 share an FFN, in which each has an adapter of its own: it is never narrowed
SHARED_FFNS: dict[str, dict[str, Any]] = {
    "zamba2": STANDARD
    | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1}
    | {"hybrid_layer_ids": [1, 3], "adapter_rank": 8, "num_key_value_heads": HEADS}
    | {"mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1}
    | {"chunk_size": 16, "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16}
}

# more families, each with its own router, shared experts or parameter names; for slow tests
SPARSE = MIXTURE | {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": HEADS,
}
SHARED = {"n_shared_experts": 1, "first_k_dense_replace": 1}
MORE_MIXTURES: dict[str, dict[str, Any]] = {
    "afmoe": MIXTURE | {"num_dense_layers": 1, "num_shared_experts": 1},
    "cohere2_moe": MIXTURE,
    "deepseek_v2": SPARSE | SHARED | LATENT,
    "deepseek_v3": SPARSE | SHARED | LATENT,
    "dots1": SPARSE | SHARED,
    "ernie4_5_moe": MIXTURE
    | {
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "moe_layer_interval": 1,
    },
    "exaone_moe": SPARSE | {"num_shared_experts": 1, "is_moe_layer": [False, True]},
    "flex_olmo": MIXTURE,
    "granitemoeshared": MIXTURE | {"shared_intermediate_size": 40},
    "hunyuan_v1_moe": MIXTURE | {"moe_topk": 2},
    "lfm2_moe": MIXTURE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "minimax": MIXTURE | {"layer_types": ["full_attention"] * BLOCKS},
    "minimax_m2": MIXTURE | {"rotary_dim": 4},
    "phimoe": MIXTURE,
    "qwen3_next": MIXTURE
    | {"layer_types": ["full_attention"] * BLOCKS, "shared_expert_intermediate_size": 40},
    "qwen3_5_moe_text": MIXTURE | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 40},
    "solar_open": SPARSE | SHARED,
}

ALL_FAMILIES = FAMILIES | MIXTURES | MORE_MIXTURES | SHARED_FFNS

TEXT = {key: value for key, value in STANDARD.items() if not key.endswith("_token_id")} | {
    "vocab_size": 264
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA3 = {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4} | {
    "boi_token_index": 258, "eoi_token_index": 259, "image_token_index": 260,
}  # fmt: skip
QWEN35 = {
    "text_config": TEXT
    | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2}
    | {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 14,
        "out_hidden_size": WIDTH, "num_position_embeddings": 16,
    },
    "image_token_id": 260, "video_token_id": 261,
    "vision_start_token_id": 262, "vision_end_token_id": 263,
}  # fmt: skip
LLAVA = {
    "text_config": {"model_type": "llama"} | TEXT,
    "vision_config": {"model_type": "clip_vision_model"} | VISION,
    "image_token_index": 260,
}
# classes other than causal language models of text alone -> model type, and config keys
OTHER_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": ("gemma3", GEMMA3),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", QWEN35),
    "LlavaForConditionalGeneration": ("llava", LLAVA),
    "LlamaForSequenceClassification": ("llama", STANDARD | {"vocab_size": 257, "num_labels": 1}),
    "Qwen2ForTokenClassification": ("qwen2", STANDARD | {"vocab_size": 257, "num_labels": 3}),
    "LlamaForQuestionAnswering": ("llama", STANDARD | {"vocab_size": 257}),
    "Qwen3Model": ("qwen3", STANDARD | {"vocab_size": 257}),
}


def saved_class(folder: Path, name: str, **changes: Any) -> Path:
    """A dense folder of a class of OTHER_CLASSES, with a tokenizer."""
    model_type, keys = OTHER_CLASSES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(AutoConfig.for_model(model_type, **(keys | changes)))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model with large weights, so that an error in one layer is visible in the output."""
    torch.manual_seed(seed)
    keys = (
        (FAMILIES | MIXTURES | MORE_MIXTURES | SHARED_FFNS)[family] | {"vocab_size": 257} | changes
    )
    config = AutoConfig.for_model(family, **keys)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 or (parameter.ndim == 3 and "experts" in name):
                parameter.normal_(0, 0.3)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def sink_model(block: int, **changes: Any) -> Any:
    """A tiny llama in which the line feed is an attention sink for the FFN of one block.

    Feature 0 of the hidden state is that of this token alone, and the norm in front of the FFN
    scales it by 100.
    """
    model, token = tiny_model(**changes), byte_tokenizer()("\n")["input_ids"][0]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[token, 0] = 50
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.model.layers[block].post_attention_layernorm.weight[0] = 100
    return model


def byte_tokenizer(bos: bool = False) -> Any:
    """A tokenizer of 256 bytes and one special token, which `bos` puts in front of every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {character: i for i, character in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>"
    )


def tokens(count: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random token ids (count, length)."""
    return torch.randint(1, 257, (count, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> torch.Tensor:
    """The logits (samples, length, vocabulary) of `model` for `tokens()`."""
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=tokens()).logits
    return output


def saved_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A dense model folder with a tokenizer."""
    tiny_model(family, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


QUICK_FINETUNE: dict[str, Any] = {
    "data": ["pydoc"], "max_steps": 12, "train_length": 64, "held_out": 4, "eval_every": 4,
    "learning_rate": 3e-3,
}  # fmt: skip


def finetuned(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """The record of a short finetuning of `source`, with `settings` over QUICK_FINETUNE."""
    from lrcompress.config import FinetuneSettings, ModelSettings
    from lrcompress.training.finetune import finetune_to

    checked = FinetuneSettings(**(QUICK_FINETUNE | settings))
    return finetune_to(ModelSettings(source=str(source)), checked, out)


def assert_loads_without_lrcompress(
    source: Path, folder: Path, arguments: str, tolerance: float
) -> None:
    """A process that cannot import lrcompress gets the logits of `source` from `folder`.

    `arguments` is the source text of more arguments of from_pretrained.
    """
    import lrcompress

    expected = folder.parent / "expected.pt"
    torch.save(logits(lrcompress.load(source)[0]), expected)
    script = f"""
import sys
sys.modules["lrcompress"] = None
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, {arguments})
tokens = torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    difference = (model(input_ids=tokens).logits - torch.load({str(expected)!r})).abs().max()
assert difference <= {tolerance}, difference
"""
    environment = {"HF_MODULES_CACHE": str(folder.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    assert process.returncode == 0, process.stderr


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a model folder."""
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


# what differs in the records of two runs of the same settings
RUN_SPECIFIC = ("seconds", "stages", "memory", "recipe", "saved")


def flip_a_bit(file: Path) -> None:
    """Changes one bit in the middle of `file`."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def saved_record(folder: Path) -> dict[str, Any]:
    """lrcompress.json of a factorized model, without times and paths."""
    record: dict[str, Any] = json.loads((folder / "lrcompress.json").read_text())
    for block in record["refined"]:
        block.pop("seconds")
    return {key: value for key, value in record.items() if key not in RUN_SPECIFIC}


def copied_model(folder: Path, out: Path, **config: Any) -> Path:
    """A copy of a model folder with other values of `config` keys."""
    shutil.copytree(folder, out)
    original = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(original | config))
    return out


def broken_copy(folder: Path, out: Path, weight: str, value: float) -> Path:
    """A copy of a model folder in which the first number of `weight` is `value`."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    tensors[weight].view(-1)[0] = value
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out
