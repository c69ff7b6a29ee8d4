"""Finds what a configuration names that is not there, without loading any of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from kdmesh import config
from kdmesh.auth.config import AccessConfig
from kdmesh.config import StrictModel
from kdmesh.errors import ConfigError
from kdmesh.hub import ROW_SUFFIXES
from kdmesh.outputs import refused_directory
from kdmesh.preflight.model_files import (
    adapter_problems,
    freeze_problems,
    model_problems,
    not_there,
    num_layers,
    reads_text_alone,
    rounding_problems,
)
from kdmesh.preflight.own_code import function_problems
from kdmesh.serving.config import ListenConfig
from kdmesh.sglang.config import SglangModel
from kdmesh.sglang.verified_images import images_refusal
from kdmesh_rollout.config import FakeEngine as RolloutFake
from kdmesh_rollout.config import RolloutConfig
from kdmesh_teacher.config import FakeEngine as TeacherFake
from kdmesh_teacher.config import TeacherConfig
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.sections.algorithm_config import CustomAlgorithm
from kdmesh_trainer.sections.data_config import CustomDataset, DataConfig, DatasetConfig, OtherTokenizer
from kdmesh_trainer.sections.judge_config import CustomJudge, MatchJudge
from kdmesh_trainer.sections.objective_config import CustomDivergence, Distill
from kdmesh_trainer.sections.questions_config import CustomMatch, QuestionsConfig
from kdmesh_trainer.sections.source_config import OnPolicy
from kdmesh_trainer.sections.teacher_config import teacher_key

_SERVICES: dict[str, type[StrictModel]] = {
    "trainer": TrainerConfig,
    "teacher": TeacherConfig,
    "rollout server": RolloutConfig,
}


ServiceConfig = TrainerConfig | TeacherConfig | RolloutConfig
C = TypeVar("C", bound=StrictModel)


def load_any(path: Path, overrides: Sequence[str] = ()) -> ServiceConfig:
    """The configuration in `path`, of the service that its keys belong to; nothing is fetched.

    What could be a teacher's as well as a rollout server's is the one that it is without an error, and a teacher's if
    it is both.

    Raises:
        ConfigError: as `config.load`, or no key belongs to a service.
    """
    tree = config.read_tree(path, overrides)
    known = {name: len(tree.keys() & model.model_fields) for name, model in _SERVICES.items()}
    if not any(known.values()):
        keys = "; ".join(f"a {name} has {', '.join(model.model_fields)}" for name, model in _SERVICES.items())
        raise ConfigError(f"{path} configures no service: {keys}")
    if known["trainer"] >= max(known.values()):
        return config.parse(TrainerConfig, tree, source=path, fetch=False)
    if known["rollout server"] == known["teacher"]:
        with suppress(ConfigError):
            return config.parse(TeacherConfig, tree, source=path, fetch=False)
        with suppress(ConfigError):
            return config.parse(RolloutConfig, tree, source=path, fetch=False)
    return config.parse(TeacherConfig, tree, source=path, fetch=False)


def load_as(model: type[C], path: Path, overrides: Sequence[str] = (), *, fetch: bool = True) -> C:
    """As `config.load`, where a person may have named the file of another service.

    Args:
        fetch: whether to fetch what `hf://` names and is not here yet.

    Raises:
        ConfigError: as `config.load`, or the file configures another service.
    """
    tree = config.read_tree(path, overrides)
    try:
        return config.parse(model, tree, source=path, fetch=fetch)
    except ConfigError:
        other = _other_service(model, tree, path)
        if other is None:
            raise
    wanted = next(name for name, each in _SERVICES.items() if each is model)
    raise ConfigError(f"{path} is a {other} configuration; what is wanted here is a {wanted}'s")


def _other_service(model: type[StrictModel], tree: Mapping[str, object], path: Path) -> str | None:
    """The service that `tree`, which is of no use for `model`, configures instead; None where it is not clear."""
    known = {each: len(tree.keys() & each.model_fields) for each in _SERVICES.values()}
    for name, each in _SERVICES.items():
        if known[each] > known[model]:
            return name
        if each is not model and known[each] == known[model]:
            with suppress(ConfigError):
                config.parse(each, dict(tree), source=path, fetch=False)
                return name
    return None


def kind(cfg: ServiceConfig) -> str:
    """What the configuration is for, in words."""
    return next(name for name, model in _SERVICES.items() if isinstance(cfg, model))


def missing(cfg: ServiceConfig) -> list[str]:
    """One line for each file, directory or function that `cfg` names and that is not there or not fit for its use."""
    lines = missing_to_read(cfg)
    if isinstance(cfg, TrainerConfig) and (why := refused_directory(cfg.output)) is not None:
        lines.append(f"output: {why}")
    return lines


def missing_to_read(cfg: ServiceConfig) -> list[str]:
    """As `missing`, but for where a run is to be written."""
    if isinstance(cfg, TrainerConfig):
        return list(_missing_for_trainer(cfg))
    engine = cfg.engine
    models = [] if isinstance(engine, TeacherFake | RolloutFake) else model_problems("engine.model", engine.model)
    return [*models, *_unserved(engine), *_guards(cfg.server), *_files("jobs", {"file": cfg.jobs.file})]


def missing_to_plan(cfg: ServiceConfig) -> list[str]:
    """As `missing`, of what says how large a model is: neither its weights nor any data."""
    if isinstance(cfg, TrainerConfig):
        model = cfg.student.model
        return [*model_problems("student.model", model, needs_weights=False), *_tokenizer("student.model", model)]
    engine = cfg.engine
    if isinstance(engine, TeacherFake | RolloutFake):
        return []
    return list(model_problems("engine.model", engine.model, needs_weights=False))


def refuse_missing(cfg: ServiceConfig, *, source: Path, looks: Callable[[ServiceConfig], list[str]] = missing) -> None:
    """Raises ConfigError with every line that `looks` finds, or with what keeps it from looking."""
    try:
        lines = looks(cfg)
    except OSError as error:
        raise ConfigError(f"{source}: cannot look at {error.filename}: {error.strerror}") from None
    if lines:
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError("\n".join([f"{source}: {count}", *(f"  {line}" for line in lines)]))


def _missing_for_trainer(cfg: TrainerConfig) -> Iterator[str]:
    yield from model_problems("student.model", cfg.student.model, needs_weights=cfg.student.weights == "pretrained")
    yield from _tokenizer("student.model", cfg.student.model)
    if cfg.student.lora is not None:
        yield from adapter_problems("student.lora", cfg.student.lora.target_modules, cfg.student.model)
    yield from freeze_problems("student.freeze", cfg.student.freeze, cfg.student.model)
    if (quantization := cfg.student.quantization) is not None:
        size, keep = quantization.group_size, quantization.keep
        yield from rounding_problems("student.quantization", size, keep, cfg.student.model, written=cfg.export.dtype)
    yield from _layers(cfg)
    yield from _packages(cfg)
    yield from _images(cfg)
    yield from _data(cfg.data)
    yield from _judging(cfg)
    if isinstance(cfg.source, OnPolicy):
        yield from _sampling(cfg.source)
    if isinstance(cfg.objective, Distill):
        yield from _own_code(cfg.objective)
    for key, access, addresses in servers(cfg):
        yield from _access(key, access)
        if any(address.startswith("k8s:") for address in addresses) and find_spec("kubernetes") is None:
            yield f"{key}.addresses: the package kubernetes is not installed (pip install 'kdmesh[kubernetes]')"
    yield from wrong_addresses(cfg)


def _unserved(engine: StrictModel) -> Iterator[str]:
    """Of an engine of SGLang, why it does not run its model."""
    if isinstance(engine, SglangModel) and (refusal := images_refusal(engine.model)) is not None:
        yield f"engine.model: {refusal}"


def _layers(cfg: TrainerConfig) -> Iterator[str]:
    if cfg.layers is not None:
        number = num_layers(cfg.student.model)
        why = cfg.layers.beyond(student=number, teacher=None if cfg.teacher_update_every is None else number)
        yield from () if why is None else (why,)


def _packages(cfg: TrainerConfig) -> Iterator[str]:
    if cfg.optimizer.moments == "8bit" and find_spec("torchao") is None:
        yield "optimizer.moments: torchao is not installed (pip install 'kdmesh[eightbit]')"
    if cfg.student.liger_kernels and find_spec("liger_kernel") is None:
        yield "student.liger_kernels: liger-kernel is not installed (pip install 'kdmesh[liger]')"
    for tracker in ("wandb", "mlflow"):
        if tracker in cfg.trackers and find_spec(tracker) is None:
            yield f"trackers: {tracker} is not installed (pip install 'kdmesh[{tracker}]')"


def _data(data: DataConfig) -> Iterator[str]:
    for name, dataset in data.train_datasets.items():
        yield from _dataset(f"data.train.datasets.{name}" if name else "data.train", dataset)
    cache = data.token_cache
    if cache is not None and cache.directory.exists() and not cache.directory.is_dir():
        yield f"data.token_cache.directory: {cache.directory} is not a directory"
    template = data.chat_template
    if template is not None and not template.is_file():
        yield f"data.chat_template: there is no file {template}"
    if data.teacher_tokenizer is not None:
        yield from _other_tokenizer(data.teacher_tokenizer)
    context = data.teacher_context
    if context is not None and context.kind == "template" and not context.path.is_file():
        yield f"data.teacher_context.path: there is no file {context.path}"


def _own_code(objective: Distill) -> Iterator[str]:
    if isinstance(divergence := objective.divergence, CustomDivergence):
        yield from function_problems("objective.divergence", divergence.target, divergence.params, positional=2)
    if isinstance(algorithm := objective.algorithm, CustomAlgorithm):
        key = "objective.algorithm"
        yield from function_problems(key, algorithm.target, algorithm.params, positional=1, is_class=True)


def _sampling(source: OnPolicy) -> Iterator[str]:
    judge, environment = source.judge, source.environment
    if environment is not None:
        key = "source.environment"
        yield from function_problems(
            key, environment.respond, environment.params, positional=2, target_key=f"{key}.respond"
        )
    if isinstance(judge, CustomJudge):
        positional = judge.num_arguments(of_episodes=environment is not None)
        yield from function_problems("source.judge", judge.target, judge.params, positional=positional)
    elif isinstance(judge, MatchJudge) and isinstance(match := judge.match, CustomMatch):
        yield from function_problems("source.judge.match", match.target, match.params, positional=2)


def wrong_addresses(cfg: TrainerConfig) -> Iterator[str]:
    """One line for each address of a server that must not be connected to in the way that is set."""
    for key, access, addresses in servers(cfg):
        refusals = (access.refusal(address) for address in addresses)
        yield from (f"{key}.addresses: {refusal}" for refusal in refusals if refusal is not None)


def servers(cfg: TrainerConfig) -> Iterator[tuple[str, AccessConfig, Sequence[str]]]:
    """Section, access and addresses of each kind of server that a job has."""
    for name, teacher in cfg.all_teachers.items():
        yield teacher_key(name), teacher.access, teacher.addresses
    if isinstance(cfg.source, OnPolicy):
        yield "source.rollouts", cfg.source.rollouts.access, cfg.source.rollouts.addresses
    if (rollouts := cfg.evaluation.rollouts) is not None:
        yield "evaluation.rollouts", rollouts.access, rollouts.addresses


def _access(key: str, access: AccessConfig) -> Iterator[str]:
    files = {"token_file": access.token_file}
    if access.tls is not None:
        files |= {"tls.ca": access.tls.ca, "tls.cert": access.tls.cert, "tls.key": access.tls.key}
    yield from _files(f"{key}.access", files)


def _guards(server: ListenConfig) -> Iterator[str]:
    """What says who may use a server; its contents are looked at when it starts."""
    files: dict[str, Path | None] = {}
    if server.tls is not None:
        tls = server.tls
        files |= {"tls.cert": tls.cert, "tls.key": tls.key, "tls.client_ca": tls.client_ca}
    if server.auth is not None:
        files["auth.tokens"] = server.auth.tokens
        if (jwt := server.auth.jwt) is not None:
            files |= {"auth.jwt.key": jwt.key, "auth.jwt.jwks": jwt.jwks, "auth.jwt.jwks_ca": jwt.jwks_ca}
            if find_spec("jwt") is None:
                yield "server.auth.jwt: PyJWT is not installed (pip install 'kdmesh[jwt]')"
    yield from _files("server", files)


def _files(key: str, files: Mapping[str, Path | None]) -> Iterator[str]:
    for name, path in files.items():
        if path is not None and not path.is_file():
            yield f"{key}.{name}: there is no file {path}"


def _images(cfg: TrainerConfig) -> Iterator[str]:
    model, root = cfg.student.model, cfg.data.images.root
    if cfg.student.freeze_vision and reads_text_alone(model):
        yield f"student.freeze_vision: {model} reads text alone: its config.json has no vision_config"
    if root is not None and not root.is_dir():
        yield f"data.images.root: there is no directory {root}"


def _tokenizer(key: str, path: Path) -> Iterator[str]:
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if path.is_dir() and not any((path / name).is_file() for name in files):
        yield f"{key}: {path} has no tokenizer ({' or '.join(files)})"


def _other_tokenizer(other: OtherTokenizer) -> Iterator[str]:
    key = "data.teacher_tokenizer"
    if not other.path.is_dir():
        yield f"{key}.path: {not_there(other.path)}"
    yield from _tokenizer(f"{key}.path", other.path)
    if other.chat_template is not None and not other.chat_template.is_file():
        yield f"{key}.chat_template: there is no file {other.chat_template}"


def _dataset(key: str, dataset: DatasetConfig) -> Iterator[str]:
    if isinstance(dataset, CustomDataset):
        yield from function_problems(key, dataset.target, dataset.params, positional=0)
        return
    path = dataset.path
    if not path.exists():
        yield f"{key}.path: {not_there(path, 'file or directory')}"
    elif path.is_dir() and not any(file.suffix in ROW_SUFFIXES for file in path.iterdir()):
        yield f"{key}.path: {path} has no {', '.join(ROW_SUFFIXES)} file"
    elif not path.is_dir() and not path.is_file():
        yield f"{key}.path: {path} is neither a file nor a directory: data are read from files, more than once"
    elif path.is_file() and path.suffix not in ROW_SUFFIXES:
        yield f"{key}.path: {path} is not a {', '.join(ROW_SUFFIXES)} file"


def _judging(cfg: TrainerConfig) -> Iterator[str]:
    for name, dataset in cfg.data.held_out_datasets.items():
        yield from _dataset(f"data.held_out.datasets.{name}" if name else "data.held_out", dataset)
    if cfg.evaluation.questions is not None:
        yield from _questions(cfg.evaluation.questions)


def _questions(questions: QuestionsConfig) -> Iterator[str]:
    key = "evaluation.questions"
    if not questions.path.is_file():
        yield f"{key}.path: there is no file {questions.path}"
    elif questions.path.suffix != ".jsonl":
        yield f"{key}.path: {questions.path} is not a .jsonl file"
    if isinstance(match := questions.match, CustomMatch):
        yield from function_problems(f"{key}.match", match.target, match.params, positional=2)
