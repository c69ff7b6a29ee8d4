"""What the student is trained on, and what the teacher is told beyond it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from kdmesh.chats.chat_template import TemplateSetting
from kdmesh.config import StrictModel


class TeacherMessages(StrictModel):
    """A column of each row holds the chat that leads up to the response for the teacher."""

    kind: Literal["messages"]

    column: str = "teacher_messages"
    """Its name; messages as in the chat's own column."""


class TeacherSystemPrompt(StrictModel):
    """The same instruction for every chat."""

    kind: Literal["system_prompt"]

    text: str = Field(min_length=1)
    """The teacher's system message; one that the chat has follows it after an empty line."""


class TeacherTemplate(StrictModel):
    """The chat's own messages, rendered otherwise."""

    kind: Literal["template"]

    path: Path
    """Jinja file that renders chats for the teacher, in place of the student's chat template."""


TeacherContextConfig = Annotated[TeacherMessages | TeacherSystemPrompt | TeacherTemplate, Field(discriminator="kind")]


class ChatFile(StrictModel):
    """A JSON, JSONL, CSV, Parquet or Arrow file of messages, ShareGPT, Alpaca, or of prompts with completions."""

    format: Literal["chat"] = "chat"

    path: Path
    """The file, or a directory of such files, or one that `save_to_disk` of the package datasets wrote.

    On the hub it is hf://datasets/OWNER/NAME/PATH."""

    column: str = "messages"
    """Column that holds the messages; rows of the other forms are recognised without it."""

    prompt_column: str = "prompt"
    """Column of the user's turn, or of messages, in rows that have neither messages nor the form of the others; where
    this or the next one is named, and `column` is not, in all rows that have it."""

    completion_column: str = "completion"
    """Column of the assistant's answer to it, or of messages; a row without one ends with its prompt."""

    weight_column: str | None = None
    """Column of a number that each row's loss is multiplied by, in training (docs/data.md); null: all count alike."""

    @property
    def names_answers(self) -> bool:
        """Whether rows are asked for that are a prompt with its completion, and no others."""
        return self.column == "messages" and (self.prompt_column, self.completion_column) != ("prompt", "completion")

    @property
    def named_columns(self) -> tuple[str, ...]:
        """Columns of a name of their own, which some row must have."""
        usual = {self.column: "messages", self.prompt_column: "prompt", self.completion_column: "completion"}
        return tuple(name for name, default in usual.items() if name != default)


class TextFile(StrictModel):
    """A file of plain texts, of the same kinds, of which every token carries loss (docs/data.md)."""

    format: Literal["text"]

    path: Path
    """The file, or a directory of such files, or one that `save_to_disk` of the package datasets wrote.

    On the hub it is hf://datasets/OWNER/NAME/PATH."""

    column: str = "text"
    """Column that holds the text."""

    weight_column: str | None = None
    """As that of chats."""


class CustomDataset(StrictModel):
    """A reader of your own that yields chats: see docs/extending.md."""

    format: Literal["custom"]

    target: str = Field(pattern=r"^[\w.]+:\w+$")
    """module:function; returns an iterable of lists of {role, content}."""

    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function; checked against its signature before anything loads."""


DatasetConfig = Annotated[ChatFile | TextFile | CustomDataset, Field(discriminator="format")]

DatasetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
"""Of a dataset among several; also in the names of figures."""


class SeveralDatasets(StrictModel):
    """Datasets that are judged apart, each with figures of its own."""

    format: Literal["several"]

    datasets: dict[DatasetName, DatasetConfig] = Field(min_length=1)
    """By name: each as `train` takes it."""


HeldOutConfig = Annotated[
    Annotated[float, Field(gt=0, lt=1), Tag("share")]
    | Annotated[ChatFile | TextFile | CustomDataset | SeveralDatasets, Field(discriminator="format"), Tag("dataset")],
    Discriminator(lambda given: "share" if isinstance(given, float | int) else "dataset"),
]

# A rarer dataset would make the blocks long within which the proportions are kept.
_LEAST_SHARE = Fraction(1, 100_000)


class BlendedFile(ChatFile):
    """A file of chats that is drawn from among others."""

    weight: float = Field(gt=0)
    """How often, beside the weights of the others: only their proportions count."""


class BlendedText(TextFile):
    """A file of plain texts that is drawn from among others."""

    weight: float = Field(gt=0)
    """How often, beside the weights of the others: only their proportions count."""


class BlendedCustom(CustomDataset):
    """A reader of your own that is drawn from among others."""

    weight: float = Field(gt=0)
    """How often, beside the weights of the others: only their proportions count."""


BlendedDataset = Annotated[BlendedFile | BlendedText | BlendedCustom, Field(discriminator="format")]


class Blend(StrictModel):
    """Several datasets, drawn from in fixed proportions, each in epochs of its own (docs/data.md)."""

    format: Literal["blend"]

    datasets: dict[DatasetName, BlendedDataset] = Field(min_length=1)
    """By name: each as `train` takes it, with a weight."""

    @property
    def shares(self) -> dict[str, Fraction]:
        """Of all draws, by name; they add up to 1, exactly, and 0.7 is seven tenths."""
        weights = {name: Fraction(str(dataset.weight)) for name, dataset in self.datasets.items()}
        whole = sum(weights.values())
        return {name: weight / whole for name, weight in weights.items()}

    @model_validator(mode="after")
    def _none_is_too_rare(self) -> Blend:
        for name, share in self.shares.items():
            if share < _LEAST_SHARE:
                raise ValueError(
                    f"{name} has weight {self.datasets[name].weight:g}, which is {float(share):.1e} of all draws; the "
                    f"least share is {float(_LEAST_SHARE):.0e}"
                )
        return self


TrainingDataConfig = Annotated[ChatFile | TextFile | CustomDataset | Blend, Field(discriminator="format")]


class TokenCacheConfig(StrictModel):
    """Token ids in files, made once and mapped, in place of all of them in every rank's memory (docs/data.md)."""

    directory: Path
    """Directory of the files, made if need be; best on a local disk of each node. Several jobs may share it."""

    workers: int = Field(0, ge=0, le=256)
    """Processes that tokenise while the files are made; 0 does it in the rank's own."""


class OtherTokenizer(StrictModel):
    """The teacher's tokenizer, where it is not the student's: what is compared is the same bytes in both."""

    path: Path
    """Directory of the teacher's tokenizer, or hf://OWNER/MODEL on the hub. Required."""

    chat_template: Path | None = None
    """Jinja file that replaces its own chat template."""

    chat_template_settings: dict[str, TemplateSetting] = Field(default_factory=dict)
    """As `data.chat_template_settings`, of its chat template."""

    min_aligned: float = Field(0.3, ge=0, le=1)
    """Least part of the loss tokens that must be compared with the teacher's; fewer refuse to start."""


class ImagesConfig(StrictModel):
    """Images in the messages, for a student that reads them (docs/vision.md)."""

    root: Path | None = None
    """Directory that paths are relative to, and that none may leave; null: that of the dataset's file."""

    column: str = "images"
    """Column of each row's images, in order, for parts of type image that name none themselves."""

    allow_urls: bool = False
    """Fetch images that are named by http or https when the dataset is read, on every rank."""

    max_mib: float = Field(8, gt=0, le=15)
    """Largest encoded image; a teacher may take smaller ones only."""

    max_pixels: int = Field(2**24, ge=1, le=2**28)
    """Most pixels of an image, width times height, before the model's processor scales it."""


class DataConfig(StrictModel):
    """What the student is trained on and judged by."""

    train: TrainingDataConfig
    """Chats, or plain texts, to train on."""

    held_out: HeldOutConfig | None = None
    """Chats, or plain texts, to evaluate on, in one dataset or in several; or a share of the rows of `train`, which are
    then not trained on (docs/data.md). Unset evaluates nothing."""

    max_tokens: int = Field(4096, ge=8)
    """Longest sequence; a plain text is cut into as many as it needs. The student must have positions for it, but for
    rotary ones, which go on beyond what was learnt; those of type dynamic or longrope end where their angles would
    change."""

    too_long: Literal["truncate", "drop", "fail"] = "truncate"
    """What happens to a longer chat; truncated and dropped ones are counted and logged."""

    trained_turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns in a chat carry loss, but for those that a row leaves out by `weight: 0` or
    `train: false`."""

    unusable: Literal["drop", "fail"] = "fail"
    """What happens to a row that cannot be aligned with its template or trains no token."""

    chat_template: Path | None = None
    """Jinja file that replaces the tokenizer's own chat template."""

    chat_template_settings: dict[str, TemplateSetting] = Field(default_factory=dict)
    """Values of variables of the chat template, `enable_thinking: false` for example. The trained model is written
    with them."""

    teacher_column: str | None = None
    """Column that holds the name of each row's teacher, one of `teachers`; null: all rows have the same."""

    teacher_tokenizer: OtherTokenizer | None = None
    """The teacher has this tokenizer instead of the student's; null: it has the same."""

    teacher_context: TeacherContextConfig | None = None
    """What the teacher is told beyond what the student reads; then only the last assistant turn carries loss."""

    images: ImagesConfig = ImagesConfig()
    """Images in the messages."""

    token_cache: TokenCacheConfig | None = None
    """Where the token ids of `train` lie in files; null: they are in every rank's memory."""

    @property
    def trains_only_last(self) -> bool:
        """Whether an assistant turn that others follow never carries loss."""
        return self.trained_turns == "last"

    @property
    def train_datasets(self) -> Mapping[str, ChatFile | TextFile | CustomDataset]:
        """What is trained on, by name; that of the only dataset is empty."""
        return self.train.datasets if isinstance(self.train, Blend) else {"": self.train}

    @property
    def has_weights(self) -> bool:
        """Whether some rows that are trained on say how much they count."""
        return any(_weight_column(dataset) is not None for dataset in self.train_datasets.values())

    @property
    def has_texts(self) -> bool:
        """Whether some of it is plain text."""
        return any(isinstance(dataset, TextFile) for dataset in self._every)

    @property
    def has_chats(self) -> bool:
        """Whether some of it is chats."""
        return not all(isinstance(dataset, TextFile) for dataset in self._every)

    @property
    def _every(self) -> Sequence[ChatFile | TextFile | CustomDataset]:
        return [*self.train_datasets.values(), *self.held_out_datasets.values()]

    @property
    def held_out_share(self) -> float | None:
        """Of the rows of `train`; None: they are all trained on."""
        return self.held_out if isinstance(self.held_out, float) else None

    @property
    def held_out_datasets(self) -> Mapping[str, ChatFile | TextFile | CustomDataset]:
        """What is evaluated on beside `train`, by name; that of the only dataset is empty."""
        if self.held_out is None or isinstance(self.held_out, float):
            return {}
        return self.held_out.datasets if isinstance(self.held_out, SeveralDatasets) else {"": self.held_out}

    @model_validator(mode="after")
    def _tokens_can_be_kept(self) -> DataConfig:
        if self.token_cache is None:
            return self
        for name, dataset in self.train_datasets.items():
            if isinstance(dataset, CustomDataset):
                key = f"data.train.datasets.{name}" if name else "data.train"
                raise ValueError(f"token_cache needs files: nobody knows when what {key} reads has changed")
        return self

    @model_validator(mode="after")
    def _columns_can_be_read(self) -> DataConfig:
        custom = any(isinstance(dataset, CustomDataset) for dataset in self._every)
        if self.has_texts and (self.teacher_context is not None or self.teacher_tokenizer is not None):
            key = "teacher_context" if self.teacher_tokenizer is None else "teacher_tokenizer"
            raise ValueError(f"{key} needs chats: it does not go with a dataset of format text")
        if isinstance(self.teacher_context, TeacherMessages) and custom:
            raise ValueError("teacher_context messages needs files: a reader of your own gives no second chat")
        if self.teacher_tokenizer is not None and (self.teacher_context is not None or self.teacher_column is not None):
            raise ValueError("teacher_tokenizer does not go with teacher_context or teacher_column")
        if self.teacher_column is not None and custom:
            raise ValueError("teacher_column needs files: a reader of your own gives chats alone")
        return self

    @model_validator(mode="after")
    def _weights_are_used(self) -> DataConfig:
        if any(_weight_column(dataset) is not None for dataset in self.held_out_datasets.values()):
            raise ValueError("weight_column is for training: every held-out row counts alike")
        if self.has_weights and self.teacher_tokenizer is not None:
            raise ValueError("weight_column does not go with teacher_tokenizer")
        return self


def _weight_column(dataset: ChatFile | TextFile | CustomDataset) -> str | None:
    return None if isinstance(dataset, CustomDataset) else dataset.weight_column
