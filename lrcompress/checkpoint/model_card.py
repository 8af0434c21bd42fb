"""The model card of a checkpoint: what the model is, where it runs, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lrcompress.checkpoint.export.gguf_families import FAMILIES
from lrcompress.reporting.metric import Summary
from lrcompress.reporting.provenance import training
from lrcompress.reporting.render import render
from lrcompress.reporting.served import served_tables
from lrcompress.reporting.significance import Comparison
from lrcompress.reporting.tables import table
from lrcompress.runtime.errors import InputError, validation_reason
from lrcompress.runtime.safe_parsing import read_object

NARROWED, LOW_RANK = "narrowed", "low-rank"


def model_card(folder: Path, record: Mapping[str, Any]) -> str:
    """README.md of the checkpoint `folder`, whose lrcompress.json is `record`.

    Raises InputError where the metrics or comparisons in `record` are damaged.
    """
    try:
        metrics = TypeAdapter(list[Summary]).validate_python(record.get("metrics", ()))
        compared = TypeAdapter(list[Comparison]).validate_python(record.get("comparisons", ()))
    except ValidationError as error:
        raise InputError(
            f"the metrics of {str(folder / 'lrcompress.json')!r} are damaged "
            f"({validation_reason(error)}): remove them"
        ) from None
    config = _config(folder)
    kinds = _kinds(config, record)
    return render(
        "card.md.jinja",
        escape=False,
        title=_title(kinds, record),
        kinds=kinds,
        record=record,
        programs=list(_programs(config, kinds, record)),
        table=table(metrics),
        served=served_tables(record),
        training=training(record),
        comparisons=compared,
    )


def _config(folder: Path) -> Mapping[str, Any]:
    """config.json; empty where it cannot be read, which loading the folder tells."""
    try:
        return read_object(folder / "config.json")
    except (OSError, ValueError):
        return {}


def _forms(config: Mapping[str, Any]) -> dict[str, str]:
    """The form of each changed layer in config.json, by name."""
    quantization = config.get("quantization_config")
    modules = quantization.get("modules") if isinstance(quantization, Mapping) else None
    layers = modules.items() if isinstance(modules, Mapping) else ()
    return {
        name: str(layer["form"])
        for name, layer in layers
        if isinstance(layer, Mapping) and "form" in layer
    }


def _kinds(config: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[str, ...]:
    """What was done to FFNs: NARROWED, LOW_RANK, both, or nothing."""
    forms = set(_forms(config).values())
    linears = (record.get("factorized_from") or record).get("linears", ())
    forms |= {str(linear["form"]) for linear in linears if "form" in linear} - {"dense"}
    # in a narrowed FFN, a low-rank linear too is smaller than the dense one
    narrowed = NARROWED in forms or any(map(_is_smaller, linears))
    low_rank = bool(forms - {NARROWED})
    return (NARROWED,) * narrowed + (LOW_RANK,) * low_rank


def _is_smaller(linear: Mapping[str, Any]) -> bool:
    dense = [linear.get("out_features"), linear.get("in_features")]
    return list(linear.get("shape", dense)) != dense


def _title(kinds: tuple[str, ...], record: Mapping[str, Any]) -> str:
    source = record.get("source") or record.get("trained_from") or "causal language model"
    kind = " and ".join(kinds) or "dense"
    form = ", in stock layers" if record.get("export") == "dense" else ""
    return f"{kind.capitalize()} {source}{form}"


def _programs(
    config: Mapping[str, Any], kinds: tuple[str, ...], record: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Programs beside transformers that run the model, and how."""
    if not kinds or record.get("quantized") or record.get("export"):
        return
    if not any(".experts." in name for name in _forms(config)):
        yield "vLLM", "`vllm serve FOLDER`, with lrcompress's plug-in `serving/vllm-lrcompress`"
        if kinds == (NARROWED,) and _has_gguf_form(config, record):
            export = "`lrcompress export FOLDER --to gguf --out MODEL.gguf`"
            yield "llama.cpp, Ollama, LM Studio", export
    size = "as small as this one" if _target(record) == "stock" else "which may be larger"
    export = f"`lrcompress export FOLDER --to dense --out OUT` makes an ordinary model, {size}"
    yield "any program that runs the original", export


def _has_gguf_form(config: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether a narrowed model can be exported to GGUF, as far as its record shows."""
    family = FAMILIES.get(str(config.get("model_type")))
    has_one_width = _target(record) in ("gguf", "stock")
    return family is not None and (has_one_width or family.per_block_width is not None)


def _target(record: Mapping[str, Any]) -> object:
    """The program that the model was made for."""
    return record.get("recipe", {}).get("factorize", {}).get("target")
