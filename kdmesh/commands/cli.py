"""The `kdmesh` command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from kdmesh.commands import cluster_commands, evaluation, generation, harness, planning, schemas, token_files
from kdmesh.commands.access_option import access_option, checked_addresses, read_access
from kdmesh.commands.config_option import config_argument, set_option
from kdmesh.commands.finite_range import FiniteRange
from kdmesh.commands.model_directory import ModelDirectory
from kdmesh.doctor.command import doctor
from kdmesh.errors import ConfigError, KdmeshError
from kdmesh.exit_codes import TOLD, exit_code
from kdmesh.interrupt import INTERRUPTED
from kdmesh.launch import jobs, local
from kdmesh.launch.place import exit_when_stopped
from kdmesh.launch.program import become
from kdmesh.log import can_redraw
from kdmesh.outputs import say, say_error
from kdmesh.preflight import check
from kdmesh_rollout.config import RolloutConfig
from kdmesh_teacher.config import TeacherConfig
from kdmesh_trainer.config import TrainerConfig

if TYPE_CHECKING:
    from kdmesh.config import StrictModel
    from kdmesh.rpc.teachers.doors import DoorChoice

_ERROR = 1
_SENTENCE = 300  # letters, more than any has
_FILE = click.Path(path_type=Path, dir_okay=False)


class _Commands(click.Group):
    """Turns our errors into one message: exit code 2 for what the user can put right, 3 for servers that do not
    answer, 1 for what broke.
    """

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except local.ChildFailed as error:
            code = error.exit_code if error.exit_code in (*TOLD, exit_when_stopped()) else _ERROR
            if error.is_told:
                sys.exit(code)
            _fail(error, code)
        except KdmeshError as error:
            _fail(error, exit_code(error))
        except local.Stopped as stopped:
            sys.exit(128 + stopped.signum)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List each with its whole first sentence, which click would cut at the end of a line."""
        commands = {name: self.commands[name] for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(limit=_SENTENCE)) for name, each in commands.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="kdmesh")
def main() -> None:
    """Distil large language models: a teacher service answers, trainers learn.

    \b
    See it work       kdmesh demo
    Check a machine   kdmesh doctor
    Check a config    kdmesh check examples/train.yaml
    Know its keys     kdmesh schema trainer > trainer.schema.json
    Plan its memory   kdmesh plan examples/train.yaml
    Serve a teacher   kdmesh teacher examples/teacher.yaml
    Sample a student  kdmesh rollout examples/rollout.yaml
    Train against it  kdmesh train examples/train.yaml
    Both at once      kdmesh train examples/train.yaml --serve examples/teacher.yaml
    Tokenise first    kdmesh tokenize examples/train-blend.yaml
    Prefill it first  kdmesh precompute examples/train.yaml --set 'teacher.addresses=["127.0.0.1:50051"]'
    Write a dataset   kdmesh generate --rollout 127.0.0.1:50061 --model MODEL --prompts IN.jsonl --output OUT.jsonl
    ... by any API    kdmesh generate --openai https://HOST/v1 --model-name M --prompts IN.jsonl --output OUT.jsonl
    Grade its answers kdmesh evaluate examples/train-evaluate.yaml --rollout 127.0.0.1:50061
    Judge a model     kdmesh lm-eval runs/my-student --tasks hellaswag
    Trust a teacher   kdmesh probe --teacher 127.0.0.1:50051 --model path/to/teacher
    Watch a server    kdmesh top
    Train in Kubernetes  kdmesh submit my.yaml --nodes 2 --gpus 8 --image IMAGE
    See those jobs    kdmesh jobs | kdmesh logs NAME | kdmesh describe NAME | kdmesh cancel NAME

    Every setting lives in the YAML file; the commented files in examples/ name the usual ones, docs/configuration.md
    all of them.
    """


@main.command()
@config_argument
@set_option
@click.option(
    "--serve",
    "teacher_configs",
    multiple=True,
    metavar="[NAME=]TEACHER.YAML",
    help="Also start the teacher of this file, for this run only; several times with their NAMEs in `teachers`.",
)
@click.option(
    "--serve-rollout",
    "rollout_config",
    type=_FILE,
    help="Also start the rollout server of this file, for this run only: to sample, or to answer questions.",
)
def train(
    config: Path, overrides: tuple[str, ...], teacher_configs: tuple[str, ...], rollout_config: Path | None
) -> None:
    """Distil, or fine-tune, a student as CONFIG says.

    Starts the file's `ranks` on this machine: by default one per GPU, or one on a machine without. Under torchrun it
    runs as the rank that torchrun gives it. Ctrl-C and SIGTERM end the run after the current step with a checkpoint;
    the same command continues it.

    \b
    Example: kdmesh train examples/train.yaml --set steps=200 --set optimizer.learning_rate=2e-5
    """
    serve = jobs.teachers_to_serve(teacher_configs)
    if rollout_config is not None:
        serve[jobs.rollout_to_serve(config, overrides)] = rollout_config
    if "RANK" in os.environ:
        if serve:
            raise ConfigError("--serve starts one server per command, so it does not go with torchrun's many ranks")
        become("kdmesh_trainer", config, overrides)
    jobs.train(config, overrides, serve)


@main.command()
@config_argument
@set_option
@click.option("--partial", is_flag=True, help="Keep what the run asks for first, where the cache cannot hold all.")
def precompute(config: Path, overrides: tuple[str, ...], partial: bool) -> None:
    """Have the teachers of the trainer in CONFIG keep its rows, so that the training needs no prefill.

    Says first how much that is and how long it takes. Each teacher must run, with a `cache` in its configuration
    that can hold it, as in examples/teacher-cached.yaml. Ctrl-C stops; the same command goes on, and asks only for
    what is missing. Exit code 0 when all is kept, 1 when the teacher could not keep all of it.

    \b
    Example: kdmesh precompute examples/train.yaml --set 'teacher.addresses=["127.0.0.1:50051"]'
    """
    cfg = check.load_as(TrainerConfig, config, overrides)
    check.refuse_missing(cfg, source=config, looks=check.missing_to_read)
    become("kdmesh_trainer.commands.precompute", config, overrides, *(["--partial"] if partial else []))


@main.command()
@config_argument
@set_option
def teacher(config: Path, overrides: tuple[str, ...]) -> None:
    """Serve the teacher of CONFIG until Ctrl-C or SIGTERM.

    Any number of trainers may use it at the same time: put its host:port into their `teacher.addresses`. /readyz,
    /metrics and /v1 are served over HTTP on `server.rest_port`.

    \b
    Example: kdmesh teacher examples/teacher.yaml --set server.port=50052 --set server.rest_port=8052
    """
    _serve(TeacherConfig, "kdmesh_teacher", config, overrides)


@main.command()
@config_argument
@set_option
def rollout(config: Path, overrides: tuple[str, ...]) -> None:
    """Serve the rollout server of CONFIG, which samples from a student, until Ctrl-C or SIGTERM.

    Trainers with `source: {kind: on_policy}` send it prompts and new weights: put its host:port into their
    `source.rollouts.addresses`. /readyz, /metrics and /v1 are served over HTTP on `server.rest_port`.

    \b
    Example: kdmesh rollout examples/rollout.yaml --set server.port=50062 --set server.rest_port=8062
    """
    _serve(RolloutConfig, "kdmesh_rollout", config, overrides)


@main.command("check")
@config_argument
@set_option
@click.option("--data", "reads_data", is_flag=True, help="Also tokenise a trainer's data, and name the first bad row.")
def check_command(config: Path, overrides: tuple[str, ...], reads_data: bool) -> None:
    """Say what is wrong with CONFIG, of a trainer or a server, without loading a model.

    Names every bad key with its path, and every file, directory and function that the file names and that is not
    there. Exit code 0 when all is well, 2 otherwise.

    \b
    Example: kdmesh check examples/train.yaml
    """
    cfg = check.load_any(config, overrides)
    check.refuse_missing(cfg, source=config)
    if reads_data:
        if not isinstance(cfg, TrainerConfig):
            raise ConfigError(f"{config} is a {check.kind(cfg)} configuration; --data is about a trainer's data")
        ended = subprocess.run(jobs.read_arguments(config, overrides), check=False).returncode
        if ended < 0:
            raise local.ChildFailed(f"reading the data was killed by {signal.Signals(-ended).name}", exit_code=ended)
        if ended:
            sys.exit(ended)
    click.echo(f"{config}: a good {check.kind(cfg)} configuration")


@main.command()
@click.option(
    "--teacher",
    "address",
    callback=checked_addresses,
    required=True,
    metavar="HOST:PORT",
    help="The teacher server to judge.",
)
@click.option(
    "--model",
    required=True,
    type=ModelDirectory(with_weights=True),
    help="Directory, or hf://OWNER/MODEL, of the model it should serve, with its tokenizer.",
)
@click.option("--prompts", type=_FILE, help="Text file with one prompt per line; a few built-in ones otherwise.")
@click.option(
    "--bound",
    type=FiniteRange(min=0, min_open=True),
    help="Largest difference of a log-probability that passes; by default what rounding in the served type explains.",
)
@click.option(
    "--door",
    type=click.Choice(["auto", "shm", "rdma", "collective", "stream"]),
    default="auto",
    show_default=True,
)
@access_option
def probe(
    address: str, model: Path, prompts: Path | None, bound: float | None, door: DoorChoice, access_file: Path | None
) -> None:
    """Compare a teacher server's distribution with a local forward of the same model.

    Rebuilds the distribution as a trainer does, from rows and head, and sets it against the model's own logits.
    Prints the largest difference of a log-probability and the mean KL; the last line is JSON. Exit code 0 when it
    passes, 1 when it does not.

    \b
    Example: kdmesh probe --teacher 127.0.0.1:50051 --model models/teacher
    """
    from kdmesh import log
    from kdmesh.commands import probe as probing

    log.configure_command("probe")
    texts = probing.read_prompts(prompts)
    verdict = probing.compare(address, model, texts, bound=bound, door=door, access=read_access(access_file))
    say(f"{verdict.sentence()}\n{verdict.json()}\n")
    if not verdict.has_passed:
        sys.exit(_ERROR)


@main.command()
@click.option(
    "--server",
    default="127.0.0.1:8051",
    callback=checked_addresses,
    show_default=True,
    metavar="HOST:PORT",
    help="Its REST port.",
)
@click.option("--once", "is_once", is_flag=True, help="Print one table and end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and end.")
@click.option(
    "--interval", type=FiniteRange(min=0.1, max=3600), default=1.0, show_default=True, help="Seconds between looks."
)
@access_option
def top(server: str, is_once: bool, as_json: bool, interval: float, access_file: Path | None) -> None:
    """Watch which jobs share a teacher or a rollout server, live: what each gets, waits for, holds and is refused.

    q or Ctrl-C ends it. Where the output is no terminal, or a dumb one, it prints one table.

    \b
    Example: kdmesh top --server 127.0.0.1:8051
    """
    from kdmesh.commands import top as watching

    watched = watching.Server(server, read_access(access_file))
    if is_once or as_json or not can_redraw(sys.stdout):
        watching.once(watched, as_json=as_json)
    else:
        watching.live(watched, interval_s=interval)


@main.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of the students, the report and the configuration files.  [default: runs/demo, or "
    "runs/demo-on-policy]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory that keeps the trained teacher for the next demo.  [default: .cache]",
)
@click.option("--fresh", is_flag=True, help="Train the students again; the cached teacher is used.")
@click.option("--brief", is_flag=True, help="Tiny models and eight steps: shows that all works, and nothing else.")
@click.option("--on-policy", "is_on_policy", is_flag=True, help="Let a student learn from its own answers.")
@click.option(
    "--make",
    "into",
    type=click.Path(path_type=Path, file_okay=False),
    help="Only make the demo's teacher, student and chats in this directory, for servers and jobs of your own.",
)
def demo(
    output: Path | None, cache: Path | None, fresh: bool, brief: bool, is_on_policy: bool, into: Path | None
) -> None:
    """Distil a small model on this machine, from nothing, in a few minutes on two CPU cores.

    Makes chats of this machine's Python standard library, trains a small teacher on them, serves it, and trains two
    students from the same start on the same batches: one on the docstrings, one on the teacher's distribution. With
    --on-policy, one student that samples from a rollout server and learns what the teacher thinks of its samples.
    Ends with a table and a page; the last line of stdout is JSON. Interrupted, the same command continues.

    \b
    Example: kdmesh demo --output runs/demo
    """
    from kdmesh.demo import ingredients, on_policy, plan, story, table

    chosen = plan.BRIEF if brief else plan.STANDARD
    if into is not None:
        if output or cache or fresh or is_on_policy:
            raise ConfigError("--make goes with --brief alone: all that is made lies in its directory")
        ingredients.make(chosen, into)
        return
    cache = cache or Path(".cache")
    if is_on_policy:
        sampled = on_policy.tell(chosen, output=output or Path("runs/demo-on-policy"), cache=cache, fresh=fresh)
        table.print_on_policy(sampled)
        click.echo(sampled.json())
        return
    outcome = story.tell(chosen, output=output or Path("runs/demo"), cache=cache, fresh=fresh)
    table.print_students(outcome)
    click.echo(outcome.json())


_BESIDE = (
    planning.plan,
    schemas.schema,
    token_files.tokenize,
    generation.generate,
    evaluation.evaluate,
    harness.lm_eval,
    doctor,
)

for command in (*_BESIDE, *cluster_commands.COMMANDS):
    main.add_command(command)


def _serve(model: type[StrictModel], package: str, config: Path, overrides: tuple[str, ...]) -> NoReturn:
    """Become the server."""
    check.load_as(model, config, overrides)
    become(package, config, overrides)


def _fail(error: KdmeshError, code: int) -> NoReturn:
    say_error(error)
    sys.exit(code)
