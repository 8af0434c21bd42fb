"""Compares the tensors in a model's files with those that the loaded model has."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import CONFIG_NAME

from lrcompress.models.safetensors_headers import StoredTensor, stored_tensors, weight_files
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.safe_parsing import read_object

# what older versions of transformers stored although it follows from the config: rotary tables,
# positions, versions, and masks of attention (which have four dimensions, unlike a bias)
COMPUTED = re.compile(r"(inv_freq|cos_cached|sin_cached|position_ids|masked_bias|\bversion)$")
MASKS = re.compile(r"(attn|attention)\.(bias|causal_mask)$")
# prefixes of state dicts of wrapped models, and how to save the model itself
WRAPPERS = {
    "_orig_mod.": "a compiled model: save it with `model._orig_mod.save_pretrained(FOLDER)`",
    "module.": "a parallel wrapper: save it with `model.module.save_pretrained(FOLDER)`",
    "base_model.model.": (
        "a PeftModel: save it with `model.merge_and_unload().save_pretrained(FOLDER)`"
    ),
}


def refuse_wrapped(path: str, stored: Mapping[str, StoredTensor]) -> None:
    """Raises InputError where the names of all tensors have the prefix of a wrapper."""
    for prefix, explanation in WRAPPERS.items():
        if stored and all(name.startswith(prefix) for name in stored):
            raise InputError(
                f"the names of the weights of model {path!r} start with {prefix!r}, which is the "
                f"state of {explanation}"
            )
    compiled = next((name for name in stored if "._orig_mod." in name), None)
    if compiled is not None:
        raise InputError(
            f"model {path!r} was saved with compiled modules, which gave {compiled!r} its name: "
            "put the module in `_orig_mod` of each compiled one in its place, and save again"
        )


def check_tensors(
    path: str, model: Any, report: Mapping[str, Any], description: str = CONFIG_NAME
) -> None:
    """Raises InputError where weights of `model` are not in its files, or the other way round.

    `report` is the loading info of from_pretrained, `description` what the files call the model's
    config. Tensors that the class does not have and
    knows of are no error: `unused_tensors` gives them.
    """
    missing = sorted(report["missing_keys"])
    misshapen = sorted(key[0] for key in report["mismatched_keys"])
    unexpected = [key for key in sorted(report["unexpected_keys"]) if not COMPUTED.search(key)]
    if misshapen:
        raise InputError(
            f"model {path!r} has in another shape {_some(misshapen)} of the weights that its "
            f"{description} asks for: get an intact copy"
        )
    if missing and not unexpected:
        raise InputError(_missing(path, model, missing, description))
    # the quantizer of a quantized model has tensors of its own, and such a model is never saved
    if unexpected and (missing or getattr(model, "hf_quantizer", None) is None):
        lacks = f", and lacks {_some(missing)} that the class has" if missing else ""
        raise InputError(
            f"model {path!r} is loaded as {type(model).__name__}, and its files hold "
            f"{_some(unexpected)} that this class with this config.json does not have{lacks}: "
            "correct config.json (architectures and the keys that announce such weights), or "
            "remove the tensors from the files"
        )


def _missing(path: str, model: Any, missing: list[str], description: str) -> str:
    text = f"model {path!r} lacks {_some(missing)} of the weights that its {description} asks for"
    architectures = getattr(model.config, "architectures", None) or ()
    if description != CONFIG_NAME or type(model).__name__ in architectures:
        return f"{text}: get an intact copy"
    return (
        f"{text} where it is loaded as {type(model).__name__}, because config.json names "
        f"{', '.join(map(str, architectures)) or 'no class'} in architectures: name the class that "
        "wrote the files"
    )


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors, such as {names[0]}," if len(names) > 1 else names[0]


def unused_tensors(model: Any, folder: Path) -> dict[str, StoredTensor]:
    """The tensors in the files of `folder` that `model`, loaded from it, does not have.

    They are those that its class skips, such as heads for the prediction of several tokens, without
    constants that follow from the config. There are none where the config of `folder` names another
    class: a user chose this one, without what it skips.
    """
    patterns = model._keys_to_ignore_on_load_unexpected
    if not patterns or type(model).__name__ not in _architectures(folder):
        return {}
    skipped = re.compile("|".join(f"({pattern})" for pattern in patterns))
    state = model.state_dict()
    # a module that the model has can hold the tensor in another form, as unpacked experts do
    modules = {name for name, _ in model.named_modules() if name}
    return {
        name: tensor
        for name, tensor in stored_tensors(weight_files(folder)).items()
        if skipped.search(target := _target(model, name, state))
        and target not in state
        and target.rpartition(".")[0] not in modules
        and not _follows_from_config(name, tensor)
    }


def read_tensors(folder: Path, names: Container[str]) -> dict[str, Tensor]:
    """Those tensors in the files of `folder` whose names are in `names`."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as stored:  # type: ignore[no-untyped-call,unused-ignore]
            tensors |= {n: stored.get_tensor(n) for n in stored.keys() if n in names}  # noqa: SIM118
    return tensors


def _target(model: Any, name: str, state: Mapping[str, Tensor]) -> str:
    """The name in `model` that transformers gives to the stored tensor called `name`."""
    conversions = getattr(model, "_weight_conversions", None) or ()
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    target: str = rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]
    return target


def _architectures(folder: Path) -> list[str]:
    names = read_object(folder / CONFIG_NAME).get("architectures")
    return names if isinstance(names, list) else []


def _follows_from_config(name: str, tensor: StoredTensor) -> bool:
    is_mask = MASKS.search(name) is not None and len(tensor.shape) > 1
    return is_mask or COMPUTED.search(name) is not None
