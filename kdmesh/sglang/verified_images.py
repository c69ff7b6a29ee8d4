"""Of which models SGLang is known to see of images what transformers does."""

from __future__ import annotations

import json
from pathlib import Path

from kdmesh.models.images.families import AXES_CLASSES, ROW_CLASSES


def images_refusal(model: Path) -> str | None:
    """Why the model in this directory is not run in SGLang; None: it is, or its config.json is not there to say."""
    try:
        told = json.loads((model / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    model_type = told.get("model_type") if isinstance(told, dict) else None
    if model_type not in tuple(ROW_CLASSES):  # it may be anything, of no hash too
        return None
    return (
        f"{model} is of model type {model_type}, whose images kdmesh has not verified in SGLang; set engine.kind to "
        f"transformers, or take a model that reads text alone or is one of {', '.join(AXES_CLASSES)}"
    )
