"""Refuses a directory that is not a causal language model before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kdmesh.errors import ConfigError
from kdmesh.models.images.families import VISION_CLASSES
from kdmesh.weight_files import weight_problem

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def check_model_directory(path: Path, *, needs_weights: bool) -> None:
    """Returns when `path` looks like a causal LM that transformers can build without code from elsewhere.

    Raises:
        ConfigError: naming the path and the rule it breaks.
    """
    if not path.is_dir():
        raise ConfigError(
            f"{path} is not a directory; a model is a local Hugging Face directory, never a name on the Hub"
        )
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} has no config.json, so it is not a Hugging Face model directory")
    _check_architecture(path, _read_object(path / "config.json"))
    _check_generation(path / "generation_config.json")
    if needs_weights:
        _check_weight_files(path)


def read_config(path: Path) -> PretrainedConfig:
    """What the config.json in `path` describes.

    Raises:
        ConfigError: as `check_model_directory`, or a value in it is none that the model's family takes.
    """
    check_model_directory(path, needs_weights=False)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if not isinstance(config.get_text_config(), PretrainedConfig):
            raise TypeError("what it says of the text model is no object")
    except Exception as error:  # each family looks at its values by itself
        raise ConfigError(
            f"{path / 'config.json'} describes no model that transformers {transformers.__version__} can make: "
            f"{' '.join(str(error).split())}. Fetch the file that belongs to the weights"
        ) from error
    return config


def _check_architecture(path: Path, config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | VISION_CLASSES
    if model_type not in classes:
        if "auto_map" in config:
            raise ConfigError(f"{path} needs code of its own (auto_map in config.json); kdmesh runs no remote code")
        raise ConfigError(
            f"{path} is of model type {model_type!r}, which transformers {transformers.__version__} "
            f"does not know as a causal LM, nor kdmesh as one that reads images ({', '.join(VISION_CLASSES)})"
        )
    known = classes[model_type]
    known = {known} if isinstance(known, str) else set(known)
    stated = config.get("architectures") or sorted(known)
    if known.isdisjoint(stated):
        raise ConfigError(f"{path} holds a {stated[0]}, not a causal LM ({', '.join(sorted(known))})")


def _check_generation(file: Path) -> None:
    """It is read again when the trained model is written, which must not be the first to find it damaged."""
    ends = _read_object(file).get("eos_token_id") if file.is_file() else None
    if ends is not None and not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends])):
        raise ConfigError(f"{file} must have one id, or a list of them, as eos_token_id, not {json.dumps(ends)}")


def _check_weight_files(path: Path) -> None:
    if (path / _WEIGHTS).is_file():
        _refuse_damaged(path / _WEIGHTS)
        return
    if not (path / _INDEX).is_file():
        raise ConfigError(f"{path} has no weights: neither {_WEIGHTS} nor {_INDEX}; other formats are not read")
    files = set(_read_object(path / _INDEX).get("weight_map", {}).values())
    missing = sorted(file for file in files if not (path / file).is_file())
    if missing or not files:
        raise ConfigError(f"{path} lacks {len(missing)} weight files that {_INDEX} names: {', '.join(missing[:5])}")
    for file in sorted(files):
        _refuse_damaged(path / file)


def _refuse_damaged(file: Path) -> None:
    if (problem := weight_problem(file)) is not None:
        raise ConfigError(f"{file} {problem}")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"cannot read {file}: it is not JSON, or cut short: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold an object, not {type(tree).__name__}")
    return tree
