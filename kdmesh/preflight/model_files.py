"""Finds what a model's directory lacks, without loading any of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdmesh.hub import named_on_hub
from kdmesh.parameter_names import is_meant, names_nothing
from kdmesh.weight_files import weight_problem, weight_table

_GENERATION = "generation_config.json"
_HEAD = "lm_head.weight"
_INDEX = "model.safetensors.index.json"


def model_problems(key: str, path: Path, *, needs_weights: bool = True) -> Iterator[str]:
    """One line for each thing that a model's directory lacks."""
    if not path.is_dir():
        yield f"{key}: {not_there(path)}{_meant_on_hub(path)}"
    elif not (path / "config.json").is_file():
        yield f"{key}: {path} is not a Hugging Face model directory: it has no config.json"
    elif not isinstance(_json(path / "config.json"), dict):
        yield f"{key}: {path / 'config.json'} is not a JSON object"
    elif (path / _GENERATION).is_file() and not isinstance(_json(path / _GENERATION), dict):
        yield f"{key}: {path / _GENERATION} is not a JSON object"
    elif needs_weights and not (files := sorted(path.glob("*.safetensors"))):
        yield f"{key}: {path} has no weights (*.safetensors)"
    elif needs_weights:
        for file in files:
            if (problem := weight_problem(file)) is not None:
                yield f"{key}: {file} {problem}"
        for name in sorted(_indexed(path) - {file.name for file in files}):
            yield f"{key}: {path} has no {name}, which {_INDEX} names"


def not_there(path: Path, what: str = "directory") -> str:
    """What to say of a path that does not exist."""
    hub = named_on_hub(path)
    if hub is None:
        return f"there is no {what} {path}"
    return f"{hub.repository} has not been fetched from the hub yet: training or serving does so, or `{hub.command}`"


def _meant_on_hub(path: Path) -> str:
    """How the model is written that somebody may have meant by a directory that is not there."""
    if named_on_hub(path) is not None:
        return ""
    # models/student is a path that is wrong, and Qwen/Qwen3-0.6B a name.
    is_name = len(path.parts) == 2 and not path.is_absolute() and path.parts[0] != "models" and not path.parent.exists()
    name = path if is_name else "OWNER/MODEL"
    return f" (a model is a Hugging Face directory, or on the hub hf://{name})"


def _indexed(model: Path) -> set[str]:
    """Files that a model of several tells its tensors to be in."""
    told = _json(model / _INDEX) if (model / _INDEX).is_file() else None
    names = told.get("weight_map") if isinstance(told, dict) else None
    return {name for name in names.values() if isinstance(name, str)} if isinstance(names, dict) else set()


def _json(path: Path) -> Any:
    """What is in a file; None where it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _config(model: Path) -> dict[str, Any] | None:
    """What the model's directory says of it; None where that is no object."""
    told = _json(model / "config.json") if (model / "config.json").is_file() else None
    return told if isinstance(told, dict) else None


def reads_text_alone(model: Path) -> bool:
    """Whether the model's directory says what it is, and nothing of a vision tower."""
    told = _config(model)
    return told is not None and "vision_config" not in told


def num_layers(model: Path) -> int | None:
    """Decoder layers that the model's directory speaks of; None where it does not say."""
    told = _config(model)
    if told is None:
        return None
    text = told.get("text_config")
    number = (text if isinstance(text, dict) else told).get("num_hidden_layers")
    return number if isinstance(number, int) else None


def adapter_problems(key: str, targets: str | Sequence[str], model: Path) -> Iterator[str]:
    """What the names of the model's matrices tell without building it; the trainer knows the modules themselves."""
    if find_spec("peft") is None:
        yield f"{key}: peft is not installed (pip install 'kdmesh[lora]')"
    if isinstance(targets, str):  # all that there are
        return
    names = {name.removesuffix(".weight") for name, shape in _shapes_of(model).items() if len(shape) == 2}
    modules = {name for name in names if _is_of_layer(name)}
    known = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
    for target in targets if modules else ():
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            yield f"{key}.target_modules: the layers of {model} have no {target}; they have {known}"


def freeze_problems(key: str, patterns: Sequence[str], model: Path) -> Iterator[str]:
    """What the names in the model's files tell without building it; the trainer knows the parameters themselves."""
    if not patterns or (names := _parameter_names(model)) is None:
        return
    for pattern in patterns:
        if not any(is_meant(pattern, name) for name in names):
            yield f"{key}: {names_nothing(pattern, sorted(names))}"
    if _are_all_meant(patterns, names, model):
        yield f"{key}: [{', '.join(patterns)}] leaves no parameter to train"


def _are_all_meant(patterns: Sequence[str], names: Collection[str], model: Path) -> bool:
    """Whether no parameter is left. A head that the files lack is the embedding, which either name means."""
    left = {name for name in names if not any(is_meant(pattern, name) for pattern in patterns)}
    if _HEAD not in _shapes_of(model):
        if _HEAD not in left:
            left = {name for name in left if not name.endswith(".embed_tokens.weight")}
        left.discard(_HEAD)
    return not left


def rounding_problems(
    key: str, group_size: int | None, keep: Sequence[str], model: Path, *, written: str
) -> Iterator[str]:
    """What the model's files tell without building it; the trainer knows the modules themselves.

    Args:
        written: export.dtype.
    """
    if find_spec("compressed_tensors") is None:
        yield f"{key}: compressed-tensors is not installed (pip install 'kdmesh[quantization]')"
    if (refusal := _rounding_refusal(model, written)) is not None:
        yield f"{key}: {refusal}"
        return
    names = _parameter_names(model)
    if names is None:
        return
    for pattern in keep:
        if not any(is_meant(pattern, name) for name in names):
            yield f"{key}.keep: {names_nothing(pattern, sorted(names))}"
    if group_size is None:
        return
    for name, shape in sorted(_shapes_of(model).items()):
        is_rounded = _is_of_layer(name) and len(shape) == 2 and not any(is_meant(each, name) for each in keep)
        if is_rounded and shape[1] % group_size:
            module = name.removesuffix(".weight")
            yield f"{key}.group_size is {group_size}, and {module} has {shape[1]} inputs, which it does not divide"
            return


def _rounding_refusal(model: Path, written: str) -> str | None:
    """Why matrices of this model are not rounded, whatever is asked for; None where its files do not say."""
    told = _config(model)
    if told is None:
        return None
    if told.get("quantization_config") is not None:
        return (
            f"the matrices of {model} are rounded already, and would be rounded once more, to other numbers: begin "
            "from its masters, which export.matrices masters or both leaves"
        )
    if not reads_text_alone(model):
        return f"it needs a student of text alone, and {model} reads images"
    if written == "origin" and "float16" in (told.get("dtype"), told.get("torch_dtype")):
        return (
            f"export.dtype is origin and {model} has float16, which does not hold every scale: choose bfloat16 or "
            "float32"
        )
    for name, shape in sorted(_shapes_of(model).items()):
        if not _is_of_layer(name):
            continue
        if "experts" in (parts := name.split(".")) or (len(shape) > 2 and not any("conv" in part for part in parts)):
            return f"{model} is a mixture of experts, which lie in one tensor when it is trained; {name} is of one"
        if len(shape) > 2:  # over tokens, which all layers with a state have
            return (
                f"it does not go with layers that carry a state from token to token, which {model} has: {name} is of "
                "a convolution"
            )
    return None


def _is_of_layer(name: str) -> bool:
    """Layers have numbers. What has none is an embedding, the last norm or the head."""
    return any(part.isdigit() for part in name.split("."))


def _parameter_names(model: Path) -> set[str] | None:
    """Those of a causal LM, from the tables of its files alone; None where transformers may call some otherwise.

    It does so with experts, with models that read images, and with those whose names do not begin with `model`.
    """
    names = {name for file in model.glob("*.safetensors") for name in weight_table(file) or {}} - {"__metadata__"}
    is_usual = all(name.startswith(("model.", "lm_head.")) for name in names)
    if not names or not is_usual or not reads_text_alone(model) or any("experts" in name.split(".") for name in names):
        return None
    return names | {_HEAD}  # which is not there where it is the embedding


def _shapes_of(model: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors in the model's files, by name, from their tables alone."""
    return {
        name: tuple(entry["shape"])
        for file in model.glob("*.safetensors")
        for name, entry in (weight_table(file) or {}).items()
        if name != "__metadata__"
    }
