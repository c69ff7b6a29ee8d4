"""The tokenizer that lies beside a model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kdmesh.errors import ConfigError

# One of these is there when a directory has a tokenizer at all.
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in directory `path`; None when the directory has none.

    Raises:
        ConfigError: there are tokenizer files, but they do not make one without code of their own.
    """
    if not any((path / file).is_file() for file in _FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers takes what its files hold for what it expects there
        raise ConfigError(f"the tokenizer in {path} cannot be loaded: {error}") from error
    return tokenizer
