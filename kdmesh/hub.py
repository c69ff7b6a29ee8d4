"""Models and datasets that a configuration names on Hugging Face's hub, as directories of this machine.

    hf://Qwen/Qwen3-0.6B              a model
    hf://Qwen/Qwen3-0.6B@a1b2c3       a branch, tag or commit of it
    hf://datasets/openai/gsm8k/main   a directory, or a file, of a dataset
    hf://datasets/OWNER/NAME@refs/convert/parquet/default/train
                                      of the Parquet files that the hub makes of a dataset

They lie in the hub's own cache (`HF_HOME`), where other programs find them too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kdmesh.errors import ConfigError

PREFIX = "hf://"

_NAME = r"[\w.-]+"
_FORM = re.compile(
    rf"hf://(?P<kind>datasets/)?(?!datasets/)(?P<name>{_NAME}/{_NAME})"
    r"(@(?P<revision>refs/(convert/\w+|pr/\d+)|[^/\s]+))?(/(?P<inside>\S+))?"
)
_COMMIT = re.compile("[0-9a-f]{40}")
# What transformers and kdmesh read of a model, and not the same weights in other formats.
_SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_WEIGHTS = ("*.safetensors",)
_TWICE = ("consolidated*", "original/*")

ROW_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
"""Of the files that a dataset's rows are read from, and fetched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPath:
    """What `hf://` names."""

    repository: str  # "Qwen/Qwen3-0.6B"
    is_dataset: bool
    revision: str | None  # a branch, tag or commit; None: "main"
    inside: str  # a directory or file of the repository; empty: all of it

    @classmethod
    def parse(cls, text: str) -> HubPath:
        """Raises ConfigError where `text` is not of that form."""
        match = _FORM.fullmatch(text.rstrip("/"))
        if match is None or ".." in text:
            raise ConfigError(
                f"{text} is neither hf://OWNER/MODEL[@REVISION] nor hf://datasets/OWNER/NAME[@REVISION][/PATH]"
            )
        return cls(
            repository=match["name"],
            is_dataset=match["kind"] is not None,
            revision=match["revision"],
            inside=match["inside"] or "",
        )

    @property
    def command(self) -> str:
        """What fetches it by itself."""
        options = " --repo-type dataset" * self.is_dataset
        options += "" if self.revision is None else f" --revision {self.revision}"
        return f"hf download {self.repository}{options}"


def named_on_hub(path: Path) -> HubPath | None:
    """What `path` was before it became one, where that was `hf://` and stayed so because it is not here."""
    text = path.as_posix()
    return HubPath.parse(text.replace("hf:/", PREFIX, 1)) if text.startswith("hf:/") else None


def named_in(value: Any, *keys: str) -> Iterator[tuple[str, str]]:
    """What of a configuration begins with `hf://`, each after its key."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from named_in(each, *keys, str(key))
    elif isinstance(value, str) and value.startswith(PREFIX):
        yield ".".join(keys), value


def made_local(tree: dict[str, Any], *, fetch: bool) -> dict[str, Any]:
    """A configuration with directories and files of this machine in place of everything that begins with `hf://`.

    What was fetched once is not asked for again, so a branch stays where it was: all ranks have the same, and a run
    that is continued.

    Args:
        fetch: whether to fetch what is not here; otherwise it stays as it is named.

    Raises:
        ConfigError: naming the key: it is not of the form, or cannot be fetched.
    """
    local = {}
    for key, text in named_in(tree):
        with_weights = key.rpartition(".")[2] == "model"
        try:
            if fetch:
                found: Path | None = local_path(text, with_weights=with_weights)
            else:
                found = _Wanted(path=HubPath.parse(text), with_weights=with_weights).here()
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
        if found is not None:
            local[key] = str(found)
    replaced: dict[str, Any] = _replaced(tree, local)
    return replaced


def local_path(text: str, *, with_weights: bool) -> Path:
    """Where what `text` names lies on this machine, fetched if it was not yet.

    Args:
        with_weights: of a model; a tokenizer needs none.

    Raises:
        ConfigError: it is not of the form, or cannot be fetched.
    """
    wanted = _Wanted(path=HubPath.parse(text), with_weights=with_weights)
    return wanted.here() or wanted.fetched()


def _replaced(value: Any, by_key: Mapping[str, str], *keys: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(each, by_key, *keys, str(key)) for key, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, by_key, *keys, str(n)) for n, each in enumerate(value)]
    return by_key.get(".".join(keys), value)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What is read of it."""

    path: HubPath
    with_weights: bool  # of a model; a tokenizer needs none

    def here(self) -> Path | None:
        """Where it lies, if it was fetched to its end before; the hub is not asked."""
        commit = self._commit()
        if commit is None or not self._mark(commit).exists():
            return None
        snapshot = self._storage / "snapshots" / commit / self.path.inside
        return snapshot if snapshot.exists() else None

    def fetched(self) -> Path:
        """Where it lies once the hub has been asked for it. Raises ConfigError."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        path, what = self.path, "dataset" if self.path.is_dataset else "model"
        # Where another part was fetched before, that commit: a branch that moved since stays where it was.
        known = self._commit()
        revision = known if known is not None and self._mark(known).parent.is_dir() else path.revision
        try:
            snapshot = Path(
                snapshot_download(
                    path.repository,
                    repo_type=what,
                    revision=revision,
                    allow_patterns=list(self._patterns()),
                    ignore_patterns=None if path.inside else [*_TWICE, "*/*"],
                )
            )
        except GatedRepoError:
            raise ConfigError(
                f"{path.repository} is given only to who has agreed to its terms: do so at "
                f"https://huggingface.co/{'datasets/' * path.is_dataset}{path.repository}, then `hf auth login`"
            ) from None
        except RepositoryNotFoundError:
            raise ConfigError(
                f"the hub has no {what} {path.repository}, or none that you may read (`hf auth login`)"
            ) from None
        except RevisionNotFoundError:
            raise ConfigError(f"{path.repository} has no revision {revision}") from None
        except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
            raise ConfigError(f"{path.repository} could not be fetched: {_first_line(error)}") from None
        found = snapshot / path.inside
        if not found.exists():
            raise ConfigError(
                f"{path.repository} has no {path.inside or 'file at its top'} that kdmesh reads: it reads "
                f"{', '.join(self._kinds)}; name the file or directory behind the name of the {what}"
            )
        mark = self._mark(snapshot.name)
        with suppress(OSError):  # somebody else's cache; the hub is asked again then
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        return found

    @property
    def _kinds(self) -> tuple[str, ...]:
        """Of the files that are read."""
        return (
            tuple(f"*{suffix}" for suffix in ROW_SUFFIXES)
            if self.path.is_dataset
            else (*_SETTINGS, *(_WEIGHTS if self.with_weights else ()))
        )

    def _patterns(self) -> Iterator[str]:
        inside = self.path.inside
        if self.path.is_dataset and inside:
            yield inside  # which may be a file
        yield from (f"{inside}/{kind}" if inside else kind for kind in self._kinds)

    @property
    def _storage(self) -> Path:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        kind = "dataset" if self.path.is_dataset else "model"
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.path.repository, repo_type=kind)

    def _commit(self) -> str | None:
        """Which one its revision was when it was last fetched."""
        revision = self.path.revision or "main"
        if _COMMIT.fullmatch(revision):
            return revision
        reference = self._storage / "refs" / revision
        return reference.read_text("utf-8").strip() if reference.is_file() else None

    def _mark(self, commit: str) -> Path:
        """There once everything has come: a download that was cut leaves a directory that looks like a whole one."""
        part = self.path.inside or ("all" if self.with_weights or self.path.is_dataset else "settings")
        return self._storage / "kdmesh" / commit / quote(part, safe="")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
