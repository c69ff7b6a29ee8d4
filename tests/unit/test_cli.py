"""Holds what the command line says and how it ends, without starting a service."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kdmesh.commands import cli
from kdmesh.errors import DataError
from kdmesh.launch import jobs
from kdmesh.launch.program import set_arguments
from kdmesh.preflight import check
from kdmesh_trainer.config import TrainerConfig
from kdmesh_trainer.data.files.pieces import find_files
from kdmesh_trainer.saved_config import configured_identity


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(cli.main, arguments)
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trainer's configuration, everything it names, and a module of the user's own, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for model in ("student", "teacher"):
        (tmp_path / model).mkdir()
        for name in ("config.json", "tokenizer.json"):
            (tmp_path / model / name).write_text("{}")
        (tmp_path / model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # of no tensor
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "teacher.yaml").write_text("engine: {kind: transformers, model: teacher}\n")
    (tmp_path / "rollout.yaml").write_text("engine: {kind: transformers, model: student, max_running: 8}\n")
    for module in (tmp_path / "mine.py", tmp_path / "parts" / "inner" / "mine.py"):
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text("import torch\ndef divergence(log_q, log_p, *, strength): return None\n")
    path = tmp_path / "train.yaml"
    path.write_text(
        "output: run\nsteps: 10\nstudent: {model: student}\nteacher: {addresses: ['127.0.0.1:1']}\n"
        "data: {train: {format: chat, path: train.jsonl}}\n"
    )
    return path


def write_table(*matrices: str, shape: tuple[int, int] = (4, 4)) -> None:
    """Weights of the student with these matrices and a norm, of which only the table is there."""
    shapes = {**{f"{name}.weight": shape for name in matrices}, "model.norm.weight": [4]}
    table = json.dumps(
        {"__metadata__": {}, **{name: {"shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}}
    ).encode()
    Path("student/model.safetensors").write_bytes(len(table).to_bytes(8, "little") + table)


def test_a_good_configuration_is_called_good(good: Path) -> None:
    assert run("check", "train.yaml").output == "train.yaml: a good trainer configuration\n"
    assert run("check", "teacher.yaml").output == "teacher.yaml: a good teacher configuration\n"
    assert run("check", "rollout.yaml").output == "rollout.yaml: a good rollout server configuration\n"


def test_every_bad_key_is_reported_at_once_with_exit_code_2(good: Path) -> None:
    result = run("check", "train.yaml", "--set", "batch.size=3", "--set", "steps=none")
    assert result.exit_code == 2
    assert "batch.size: there is no such key" in result.output
    assert "steps: " in result.output
    assert "(got 'none')" in result.output
    result = run("check", "train.yaml", "--set", "steps=1000000000000000")
    assert result.exit_code == 2
    assert "steps (1000000000000000) must be no more than 99999999" in result.output


@pytest.mark.parametrize(("file", "package"), [("teacher.yaml", "kdmesh_teacher"), ("rollout.yaml", "kdmesh_rollout")])
def test_images_that_sglang_was_not_verified_with_are_refused_before_anything_loads(
    good: Path, file: str, package: str
) -> None:
    Path("seeing").mkdir()
    Path("seeing/config.json").write_text('{"model_type": "internvl"}')
    Path(file).write_text("engine: {kind: sglang, model: seeing}\nserver: {port: 0, rest_port: 0}\n")
    result = run("check", file)
    sentence = "seeing is of model type internvl, whose images kdmesh has not verified in SGLang; set engine.kind to "
    assert result.exit_code == 2
    assert f"engine.model: {sentence}" in result.output
    started = subprocess.run([sys.executable, "-m", package, file], capture_output=True, text=True, timeout=100)
    assert started.returncode == 2
    assert sentence in started.stderr


def test_a_path_that_cannot_be_looked_at_is_named(good: Path) -> None:
    name = "x" * 300
    for key in ("student.model", "data.train.path", "output"):
        result = run("check", "train.yaml", "--set", f"{key}={name}/y")
        assert result.exit_code == 2
        assert f"train.yaml: cannot look at {name}" in result.output
        assert "File name too long" in result.output


def test_everything_that_is_not_there_is_reported_at_once(good: Path) -> None:
    custom = "objective.divergence={name: custom, target: 'mine:divergnce'}"
    context = "data.teacher_context={kind: template, path: told.jinja}"
    overrides = ["student.model=gone", "data.train.path=gone.jsonl", "data.chat_template=gone.jinja", custom, context]
    result = run("check", "train.yaml", *set_arguments(["objective.name=distill", *overrides]))
    assert result.exit_code == 2
    for words in (
        "5 problems",
        "student.model: there is no directory gone",
        "data.train.path: there is no file or directory gone.jsonl",
        "data.chat_template: there is no file gone.jinja",
        "data.teacher_context.path: there is no file told.jinja",
        "mine.py defines no 'divergnce'",
    ):
        assert words in result.output


@pytest.mark.parametrize(
    ("target", "params", "words"),
    [
        ("mine:divergence", "{strength: 1}", "a good trainer configuration"),
        ("mine:divergence", "{}", "requires 'strength'"),
        ("parts.inner.mine:divergence", "{strength: 1}", "a good trainer configuration"),
        ("parts.inner.mine:divergence", "{}", "requires 'strength'"),
        ("parts.inner.absent:divergence", "{}", "there is no module 'parts.inner.absent'"),
        ("mine.absent:divergence", "{}", "there is no module 'mine.absent'"),
        ("mine:divergence", "{strength: 1, colour: red}", "has no parameter 'colour'"),
        ("mine:torch", "{}", "a good trainer configuration"),
        ("nobody.knows:this", "{}", "there is no module 'nobody.knows'"),
        ("kdmesh.losses.divergences:forward_kl", "{}", "a good trainer configuration"),
    ],
)
def test_custom_functions_are_checked_without_importing_them(good: Path, target: str, params: str, words: str) -> None:
    custom = f"objective={{name: distill, divergence: {{name: custom, target: '{target}', params: {params}}}}}"
    assert words in run("check", "train.yaml", "--set", custom).output


@pytest.mark.parametrize(
    "source",
    [
        b"try:\n    import absent\nexcept ImportError:\n    def divergence(log_q, log_p, strength): return None\n",
        b"if True:\n    def divergence(log_q, log_p, **how): return None\n",
        b"from parts.inner.mine import *\n",
        b"import parts.inner.mine\ndef __getattr__(name): return getattr(parts.inner.mine, name)\n",
        b"one, divergence = 1, lambda log_q, log_p, strength: None\n",
        b"\xef\xbb\xbfdef divergence(log_q, log_p, strength): return None\n",
        b"# -*- coding: latin-1 -*-\n# \xe9\ndef divergence(log_q, log_p, strength): return None\n",
    ],
)
def test_what_only_importing_tells_of_custom_functions_is_not_refused(good: Path, source: bytes) -> None:
    Path("mine.py").write_bytes(source)
    custom = "{name: custom, target: 'mine:divergence', params: {strength: 1}}"
    overrides = set_arguments([f"objective={{name: distill, divergence: {custom}}}"])
    assert run("check", "train.yaml", *overrides).output == "train.yaml: a good trainer configuration\n"


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("all-linear", "a good trainer configuration"),
        ("[q_proj, 0.v_proj]", "a good trainer configuration"),
        ("[q_proj, w_q]", "student.lora.target_modules: the layers of student have no w_q; they have q_proj, v_proj\n"),
        ("[norm]", "student.lora.target_modules: the layers of student have no norm; they have"),
        ("[lm_head]", "the layers of student have no lm_head; they have q_proj, v_proj\n"),
    ],
)
def test_modules_for_adapters_are_looked_for_in_the_table_of_the_weights(good: Path, targets: str, words: str) -> None:
    write_table("lm_head", "layers.0.q_proj", "layers.0.v_proj")
    assert words in run("check", "train.yaml", "--set", f"student.lora.target_modules={targets}").output


@pytest.mark.parametrize(
    ("freeze", "beside", "words"),
    [
        ("[model.layers.0, 'model.layers.*.q_proj', lm_head]", (), "a good trainer configuration"),
        (
            "[model.layer.0]",
            (),
            "student.freeze: model.layer.0 names no parameter; model has embed_tokens, layers, norm\n",
        ),
        ("[embed_tokens]", (), "student.freeze: embed_tokens names no parameter; the model has lm_head, model\n"),
        ("[model]", (), "student.freeze: [model] leaves no parameter to train\n"),
        ("[lm_head, model.layers, model.norm]", (), "model.norm] leaves no parameter to train\n"),
        ("[model]", ("lm_head",), "a good trainer configuration"),
        ("[model.layers, model.norm]", (), "a good trainer configuration"),
        ("['*', lm_head]", ("lm_head",), "student.freeze: [*, lm_head] leaves no parameter to train\n"),
        ("[model.layer.0]", ("model.layers.0.mlp.experts.0.up",), "a good trainer configuration"),
        ("[model.layer.0]", ("wte",), "a good trainer configuration"),
    ],
)
def test_names_of_frozen_parameters_are_looked_for_in_the_table_of_the_weights(
    good: Path, freeze: str, beside: tuple[str, ...], words: str
) -> None:
    write_table("model.embed_tokens", "model.layers.0.q_proj", "model.layers.1.v_proj", *beside)
    assert words in run("check", "train.yaml", "--set", f"student.freeze={freeze}").output


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ("{weights: int4, group_size: 32}", "a good trainer configuration"),
        (
            "{weights: int4, group_size: 64}",
            "group_size is 64, and model.layers.0.q_proj has 32 inputs, which it does not divide\n",
        ),
        ("{weights: int4, group_size: 64, keep: [model.layers]}", "a good trainer configuration"),
        (
            "{weights: int8, keep: [model.layer.0]}",
            "student.quantization.keep: model.layer.0 names no parameter; model has embed_tokens, layers, norm\n",
        ),
    ],
)
def test_groups_of_rounded_matrices_are_held_against_the_table_of_the_weights(
    good: Path, monkeypatch: pytest.MonkeyPatch, quantization: str, words: str
) -> None:
    monkeypatch.setattr("kdmesh.preflight.model_files.find_spec", lambda name: name)
    write_table("model.embed_tokens", "model.layers.0.q_proj", shape=(4, 32))
    assert words in run("check", "train.yaml", "--set", f"student.quantization={quantization}").output


def test_rounded_matrices_need_the_package_that_writes_them(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdmesh.preflight.model_files.find_spec", lambda name: None)
    output = run("check", "train.yaml", "--set", "student.quantization.weights=int8").output
    assert "compressed-tensors is not installed (pip install 'kdmesh[quantization]')" in output


@pytest.mark.parametrize("text", ["", "{", "[]"])
@pytest.mark.parametrize("command", ["check", "plan"])
def test_a_model_whose_configuration_is_not_json_is_told(good: Path, command: str, text: str) -> None:
    Path("student/config.json").write_text(text)
    result = run(command, "train.yaml", "--set", "student.freeze_vision=true")
    assert result.exit_code == 2
    assert "1 problem\n  student.model: student/config.json is not a JSON object\n" in result.output


def test_what_is_said_of_images_is_checked(good: Path) -> None:
    Path("student/config.json").write_text('{"model_type": "qwen3"}')
    overrides = ("--set", "student.freeze_vision=true", "--set", "data.images.root=gone")
    output = run("check", "train.yaml", *overrides).output
    assert "student.freeze_vision: student reads text alone: its config.json has no vision_config" in output
    assert "data.images.root: there is no directory gone" in output
    assert "data.images.max_mib" in run("check", "train.yaml", "--set", "data.images.max_mib=16").output


def test_a_tracker_that_is_not_installed_is_told(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    result = run("check", "train.yaml", "--set", "trackers=[tensorboard, mlflow]")
    assert result.exit_code == 2
    assert "1 problem\n  trackers: mlflow is not installed (pip install 'kdmesh[mlflow]')" in result.output


def test_a_file_that_configures_nothing_is_told_so(good: Path) -> None:
    Path("other.yaml").write_text("colour: red\n")
    result = run("check", "other.yaml")
    assert result.exit_code == 2
    assert "other.yaml configures no service" in result.output


def test_checking_loads_nothing_heavy(good: Path) -> None:
    script = (
        "import sys; from kdmesh.commands.cli import main\n"
        "try: main(['check', 'train.yaml'])\n"
        "finally: print(*{'torch', 'grpc', 'transformers', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].split() == []


def test_training_refuses_a_bad_configuration_before_anything_starts(good: Path) -> None:
    result = run("train", "train.yaml", "--set", "student.model=gone")
    assert result.exit_code == 2
    assert result.output.startswith("Error: train.yaml: 1 problem")
    assert not Path("run").exists()


def test_distilling_without_a_teacher_says_how_to_get_one(good: Path) -> None:
    result = run("train", "train.yaml", "--set", "teacher.addresses=[]")
    assert result.exit_code == 2
    assert "--serve" in result.output


@pytest.mark.parametrize("command", [("check", "train.yaml"), ("check", "teacher.yaml"), ("train", "train.yaml")])
def test_a_weight_file_that_was_never_fetched_is_told(good: Path, command: tuple[str, str]) -> None:
    model = "teacher" if command[1] == "teacher.yaml" else "student"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n"
    (Path(model) / "model.safetensors").write_text(pointer)
    adapters = [] if model == "teacher" else set_arguments(["student.lora={target_modules: [q_proj]}"])
    result = run(*command, *adapters)
    assert result.exit_code == 2
    assert f"{model}/model.safetensors is a git-lfs pointer, not a safetensors file: run" in result.output
    (Path(model) / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"oops")
    output = run(*command, *adapters).output
    assert "is not a safetensors file" in output
    assert "git-lfs" not in output


def test_a_served_teacher_is_checked_too(good: Path) -> None:
    Path("teacher.yaml").write_text("engine: {kind: transformers, model: nowhere}\n")
    result = run("train", "train.yaml", "--serve", "teacher.yaml")
    assert result.exit_code == 2
    assert "engine.model: there is no directory nowhere" in result.output


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["teacher", "train.yaml"], "train.yaml is a trainer configuration; what is wanted here is a teacher's"),
        (["rollout", "train.yaml"], "train.yaml is a trainer configuration; what is wanted here is a rollout server's"),
        (["teacher", "rollout.yaml"], "is a rollout server configuration; what is wanted here is a teacher's"),
        (["train", "teacher.yaml"], "is a teacher configuration; what is wanted here is a trainer's"),
        (["plan", "teacher.yaml"], "is a teacher configuration; what is wanted here is a trainer's"),
        (["tokenize", "teacher.yaml"], "is a teacher configuration; what is wanted here is a trainer's"),
        (["precompute", "teacher.yaml"], "is a teacher configuration; what is wanted here is a trainer's"),
        (["train", "train.yaml", "--serve", "rollout.yaml"], "is a rollout server configuration"),
    ],
)
def test_the_configuration_of_another_service_is_called_one(good: Path, command: list[str], says: str) -> None:
    result = run(*command)
    assert result.exit_code == 2
    assert says in result.output
    assert "problem" not in result.output


def test_an_output_below_a_file_is_refused(good: Path) -> None:
    Path("file").touch()
    for command in (["check", "train.yaml"], ["train", "train.yaml", "--serve", "teacher.yaml"]):
        result = run(*command, "--set", "output=file/x/y")
        assert result.exit_code == 2
        assert f"output: {good.parent / 'file'} is not a directory" in result.output


def test_a_port_of_metrics_that_is_taken_is_refused_before_a_teacher_is_served(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "start_server", lambda *arguments: pytest.fail("a server was started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        metrics = f"metrics.port={taken.getsockname()[1]}"
        result = run("train", "train.yaml", "--serve", "teacher.yaml", "--set", metrics)
    assert result.exit_code == 2
    assert "metrics: cannot listen on 127.0.0.1" in result.output


def test_a_check_of_data_that_is_killed_says_so(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(jobs, "read_arguments", lambda *_: killed)
    result = run("check", str(good), "--data")
    assert (result.exit_code, "reading the data was killed by SIGKILL" in result.output) == (1, True)


def test_data_that_are_no_file_are_refused(good: Path) -> None:
    os.mkfifo("pipe.jsonl")
    for path in ("pipe.jsonl", "/dev/null"):
        result = run("check", "train.yaml", "--set", f"data.train.path={path}")
        assert result.exit_code == 2
        assert f"data.train.path: {path} is neither a file nor a directory" in result.output
    with pytest.raises(DataError, match=r"no dataset at pipe\.jsonl: it is neither a file nor a directory"):
        find_files(Path("pipe.jsonl"))


def test_an_output_that_cannot_be_made_is_refused_and_leaves_nothing(good: Path) -> None:
    Path("nowhere").symlink_to("gone")
    before = sorted(good.parent.iterdir())
    for output, words in {
        "/proc/x/y": "/proc/x/y cannot be written: No such file or directory in /proc",
        "nowhere/x": f"{good.parent / 'nowhere'} is not a directory",
    }.items():
        result = run("check", "train.yaml", "--set", f"output={output}")
        assert result.exit_code == 2
        assert f"output: {words}" in result.output
    assert run("check", "train.yaml", "--set", "output=a/b/c").exit_code == 0
    assert sorted(good.parent.iterdir()) == before


def test_an_output_that_cannot_be_had_is_refused_before_a_teacher_is_served(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "start_server", lambda *arguments: pytest.fail("a server was started"))
    train = ("train", "train.yaml", "--serve", "teacher.yaml")
    Path("run").mkdir()
    with Path("run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run(*train)
        assert (result.exit_code, "another run is writing to run" in result.output) == (2, True), result.output
    assert not Path("run/teacher.log").exists()
    result = run(*train, "--set", "output=/proc/none")  # where nobody can make a directory
    assert (result.exit_code, "output: /proc/none cannot be written" in result.output) == (2, True), result.output


def test_a_checkpoint_of_another_configuration_is_refused_before_a_teacher_is_served(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "start_server", lambda *arguments: pytest.fail("a server was started"))
    identity = configured_identity(check.load_as(TrainerConfig, good)) | {"student (fingerprint)": "unknown yet"}
    state = Path("run/checkpoints/step-00000004/state.json")
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"next_step": 4, "world_size": 1, "identity": identity}))
    for change, says in (
        ("seed=1", "belongs to another run: seed is 1 now and was 0. Restore"),
        ("student.lora.rank=4", "student.lora is "),
        ("steps=3", "is after 4 steps, and the run is to have only 3: raise `steps`"),
    ):
        result = run("train", "train.yaml", "--serve", "teacher.yaml", "--set", change)
        assert (result.exit_code, says in result.output) == (2, True), result.output
    with pytest.raises(pytest.fail.Exception, match="a server was started"):  # by what continues it
        CliRunner().invoke(cli.main, ["train", "train.yaml", "--serve", "teacher.yaml"])


def test_what_no_rank_can_do_is_refused_before_a_teacher_is_served(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "start_server", lambda *arguments: pytest.fail("a server was started"))
    more = ("--set", "ranks=2", "--set", "parallel.shard_ranks=4")
    result = run("train", "train.yaml", "--serve", "teacher.yaml", *more)
    assert (result.exit_code, "the job has 2 ranks" in result.output) == (2, True), result.output


def test_of_several_teachers_each_is_served_by_its_name(good: Path) -> None:
    served = jobs.teachers_to_serve(("code=teacher.yaml", "maths=other.yaml"))
    assert {service.addresses: str(file) for service, file in served.items()} == {
        "teachers.code.addresses": "teacher.yaml",
        "teachers.maths.addresses": "other.yaml",
    }
    several = ["teacher=null", "teachers={code: {}, maths: {}}", "data.teacher_column=who"]
    result = run("train", "train.yaml", "--serve", "code=teacher.yaml", *set_arguments(several))
    assert result.exit_code == 2
    assert "teachers.maths.addresses is empty" in result.output
    assert "--serve maths=TEACHER.YAML" in result.output
    result = run("train", "train.yaml", "--serve", "code=teacher.yaml", "--serve", "code=teacher.yaml")
    assert "there is a server for teachers.code.addresses already" in result.output
    result = run("train", "train.yaml", "--serve", "teacher.yaml", *set_arguments(several))
    assert "a file needs a name: --serve code=TEACHER.YAML --serve maths=TEACHER.YAML" in result.output


def test_a_path_with_an_equals_sign_is_no_name(good: Path) -> None:
    assert jobs.named_file("sweep/lr=1e-4/teacher.yaml") == ("", Path("sweep/lr=1e-4/teacher.yaml"))
    assert jobs.named_file("code=sweep/lr=1e-4/teacher.yaml") == ("code", Path("sweep/lr=1e-4/teacher.yaml"))
    (served,) = jobs.teachers_to_serve(("sweep/lr=1e-4/teacher.yaml",))
    assert served.addresses == "teacher.addresses"


def test_servers_that_want_one_port_are_refused_before_one_starts(good: Path) -> None:
    several = set_arguments(["teacher=null", "teachers={code: {}, maths: {}}", "data.teacher_column=who"])
    serve = ("--serve", "code=teacher.yaml", "--serve", "maths=other.yaml")
    text = Path("teacher.yaml").read_text()
    Path("teacher.yaml").write_text(text + "server: {rest_port: 8051}\n")
    Path("other.yaml").write_text(text + "server: {port: 8051}\n")
    result = run("train", "train.yaml", *serve, *several)
    assert result.exit_code == 2
    assert "server.rest_port of teacher.yaml and server.port of other.yaml are both 8051" in result.output
    assert not Path("run").exists()


SAMPLED = ["source={kind: on_policy, rollouts: {addresses: []}}", "data.max_tokens=512", "batch.max_tokens=1024"]


def test_a_served_teacher_is_updatable_where_it_follows_the_student_and_only_there(good: Path) -> None:
    following = set_arguments(["teacher.follows_student={}"])
    result = run("train", "train.yaml", "--serve", "teacher.yaml", *following)
    assert result.exit_code == 2
    assert "engine.updatable is false, and the trainer's teacher.follows_student is set" in result.output
    teacher = good.with_name("teacher.yaml")
    teacher.write_text(teacher.read_text().replace("model:", "updatable: true, model:"), encoding="utf-8")
    result = run("train", "train.yaml", "--serve", "teacher.yaml")
    assert result.exit_code == 2
    assert "engine.updatable is true, and the trainer's teacher.follows_student is not set" in result.output


def test_a_served_teacher_gives_the_layers_that_are_compared_or_is_not_started(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "start_server", lambda *arguments: pytest.fail("a server was started"))
    Path("teacher/config.json").write_text('{"num_hidden_layers": 4}')
    train = ("train", "train.yaml", "--serve", "teacher.yaml", "--set")
    result = run(*train, "objective={name: distill, layers: {pairs: {1: 5}, weight: 1}}")
    assert (result.exit_code, "names layer 5 of the teacher, which has layers 1 to 4" in result.output) == (2, True)
    with pytest.raises(pytest.fail.Exception, match="a server was started"):
        CliRunner().invoke(cli.main, [*train, "objective={name: distill, layers: {pairs: {1: 4}, weight: 1}}"])
    Path("teacher.yaml").write_text("engine: {kind: sglang, model: teacher}\n")
    result = run(*train, "objective={name: distill, layers: {pairs: {1: 5}, weight: 1}}")
    assert (result.exit_code, "names layer 5 of the teacher, which has layers 1 to 4" in result.output) == (2, True)
    with pytest.raises(pytest.fail.Exception, match="a server was started"):
        CliRunner().invoke(cli.main, [*train, "objective={name: distill, layers: {pairs: {1: 4}, weight: 1}}"])
    Path("teacher.yaml").write_text("engine: {kind: sglang, model: teacher, pipeline_parallel: 2}\n")
    result = run(*train, "objective={name: distill, layers: {pairs: {1: 4}, weight: 1}}")
    assert result.exit_code == 2
    assert "objective.layers needs outputs of the teacher's layers: engine.pipeline_parallel is 2" in result.output


def test_a_teacher_that_judges_alone_must_have_an_address_too(good: Path) -> None:
    alone = set_arguments(["objective={name: sft}", "teacher.addresses=[]", *QUESTIONS])
    Path("questions.jsonl").touch()
    held_out = set_arguments(["data.held_out={format: chat, path: train.jsonl}"])
    result = run("train", "train.yaml", "--serve-rollout", "rollout.yaml", *alone, *held_out)
    assert result.exit_code == 2
    assert "teacher.addresses is empty" in result.output
    assert "--serve TEACHER.YAML" in result.output


def test_sampling_without_a_server_says_how_to_get_one(good: Path) -> None:
    result = run("train", "train.yaml", *set_arguments(SAMPLED))
    assert result.exit_code == 2
    assert "source.rollouts.addresses is empty" in result.output
    assert "--serve-rollout" in result.output


QUESTIONS = ["evaluation.questions={path: questions.jsonl}", "evaluation.rollouts={}"]


def test_a_served_rollout_server_answers_questions_where_nothing_is_sampled(good: Path) -> None:
    assert jobs.rollout_to_serve(good, SAMPLED).addresses == "source.rollouts.addresses"
    assert jobs.rollout_to_serve(good, QUESTIONS).addresses == "evaluation.rollouts.addresses"
    Path("questions.jsonl").touch()
    assert "a good trainer configuration" in run("check", "train.yaml", *set_arguments(QUESTIONS)).output
    result = run("train", "train.yaml", *set_arguments(QUESTIONS))
    assert result.exit_code == 2
    assert "evaluation.rollouts.addresses is empty" in result.output
    assert "--serve-rollout" in result.output
    result = run("train", "train.yaml", "--serve-rollout", "rollout.yaml")
    assert "evaluation.rollouts needs evaluation.questions" in result.output


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (QUESTIONS[:1], "evaluation.questions needs evaluation.rollouts"),
        ([*QUESTIONS, *SAMPLED], "there are evaluation.rollouts and source.rollouts"),
        (QUESTIONS, "evaluation.questions.path: there is no file questions.jsonl"),
        ([*QUESTIONS, "evaluation.questions.path=train.yaml"], "train.yaml is not a .jsonl file"),
        ([*QUESTIONS, "evaluation.questions.match={name: custom, target: 'mine:divergence'}"], "requires 'strength'"),
        ([*QUESTIONS, "evaluation.questions.match={name: custom, target: 'mine:absent'}"], "defines no 'absent'"),
        ([*QUESTIONS, "evaluation.rollouts.addresses=[somewhere]"], "'somewhere' is not of the form host:port"),
        ([*QUESTIONS, "evaluation.questions.match={name: close}"], "evaluation.questions.match"),
    ],
)
def test_questions_that_cannot_be_asked_are_named(good: Path, overrides: list[str], words: str) -> None:
    result = run("check", "train.yaml", *set_arguments(overrides))
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ("{name: custom, target: 'mine:absent'}", "source.judge.target: "),
        ("{name: custom, target: 'mine:divergence'}", "source.judge.params: divergence requires 'strength'"),
        ("{name: custom, target: 'mine:divergence', params: {colour: red}}", "has no parameter 'colour'"),
        ("{name: match, match: {name: custom, target: 'mine:absent'}}", "source.judge.match.target: "),
    ],
)
def test_judges_that_cannot_be_called_are_named(good: Path, judge: str, words: str) -> None:
    result = run("check", "train.yaml", *set_arguments([*SAMPLED, f"source.judge={judge}"]))
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("respond: 'mine:absent'", "source.environment.respond: "),
        ("respond: 'mine:divergence'", "source.environment.params: divergence requires 'strength'"),
        ("respond: 'mine:divergence', params: {colour: red}", "has no parameter 'colour'"),
    ],
)
def test_environments_that_cannot_be_called_are_named(good: Path, keys: str, words: str) -> None:
    result = run("check", "train.yaml", *set_arguments([*SAMPLED, f"source.environment={{{keys}}}"]))
    assert result.exit_code == 2
    assert words in result.output


def test_a_served_model_is_asked_by_the_trainers_own_command(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: became.append(argv[1:]))
    for more, key in (((), "evaluation"), (SAMPLED, "source")):
        overrides = [*QUESTIONS[:1], *more]
        run("evaluate", "train.yaml", "--rollout", "a:1", "--output", "o.jsonl", *set_arguments(overrides))
        sets = set_arguments([*overrides, f"{key}.rollouts.addresses=['a:1']"])
        assert became[-1] == [
            *("-m", "kdmesh_trainer.commands.evaluate", "train.yaml", *sets, "--output", "o.jsonl"),
        ]


@pytest.mark.parametrize("overrides", [(), SAMPLED, ("evaluation.every=5",)])
def test_a_run_without_questions_says_so_when_it_is_asked(good: Path, overrides: Sequence[str]) -> None:
    result = run("evaluate", "train.yaml", "--rollout", "a:1", *set_arguments(overrides))
    assert result.exit_code == 2
    assert result.output == "Error: train.yaml: evaluation.questions is not set, so there is nothing to ask\n"


def test_a_served_rollout_server_is_checked_too(good: Path) -> None:
    Path("rollout.yaml").write_text("engine: {kind: transformers, model: nowhere}\n")
    result = run("train", "train.yaml", "--serve-rollout", "rollout.yaml", *set_arguments(SAMPLED))
    assert result.exit_code == 2
    assert "engine.model: there is no directory nowhere" in result.output


@pytest.mark.parametrize("option", ["probe --teacher", "generate --rollout", "generate --teacher"])
@pytest.mark.parametrize("address", ["http://127.0.0.1:50051", "127.0.0.1"])
def test_an_address_without_a_port_is_refused_before_a_server_is_waited_for(option: str, address: str) -> None:
    result = run(*option.split(), address)
    assert result.exit_code == 2
    assert f"'{address}' is not of the form host:port" in result.output


@pytest.mark.parametrize(
    "option", ["evaluate train.yaml --timeout", "generate --timeout", "probe --bound", "top --interval"]
)
@pytest.mark.parametrize("number", ["nan", "inf", "0", "-1"])
def test_a_number_that_is_none_or_has_no_end_is_refused(option: str, number: str) -> None:
    result = run(*option.split(), number)
    assert result.exit_code == 2
    assert f"Invalid value for '{option.split()[-1]}'" in result.output


def test_a_wait_that_no_clock_can_hold_is_refused() -> None:
    result = run("top", "--interval", "1e300")
    assert (result.exit_code, "Invalid value for '--interval'" in result.output) == (2, True)


def test_prompts_that_are_not_there_are_refused_before_a_server_is_waited_for(good: Path) -> None:
    asked = ("generate", "--rollout", "127.0.0.1:1", "--model", "student")
    result = run(*asked, "--prompts", "gone.jsonl", "--output", "answers.jsonl")
    assert result.exit_code == 2
    assert result.output == "Error: cannot read gone.jsonl: No such file or directory\n"


def test_a_configuration_that_cannot_be_read_is_named_once(good: Path) -> None:
    assert run("check", "gone.yaml").output == "Error: cannot read gone.yaml: No such file or directory\n"
    Path("odd.yaml").write_bytes(b"steps: \xff")
    assert run("check", "odd.yaml").output == "Error: odd.yaml is not UTF-8: invalid start byte at byte 7\n"


def test_serving_under_torchrun_is_refused(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    result = run("train", "train.yaml", "--serve", "teacher.yaml")
    assert result.exit_code == 2
    assert "torchrun" in result.output


def test_under_torchrun_the_command_becomes_the_rank(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Became(Exception):
        pass

    def become(path: str, argv: list[str]) -> None:
        raise Became(argv[1:])

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(os, "execv", become)
    result = CliRunner().invoke(cli.main, ["train", "train.yaml", "--set", "steps=3"])
    assert isinstance(result.exception, Became)
    assert result.exception.args[0] == ["-m", "kdmesh_trainer", "train.yaml", "--set", "steps=3"]


@pytest.mark.parametrize(
    ("cores", "ranks", "with_teacher", "expected"),
    [(2, 2, True, (1, 1)), (2, 1, True, (1, 1)), (2, 1, False, (1, 2)), (16, 4, True, (8, 2)), (1, 2, True, (1, 1))],
)
def test_threads_are_divided_so_that_no_core_gets_several(
    good: Path, cores: int, ranks: int, with_teacher: bool, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "num_cores", lambda: cores)
    cfg = jobs.config.load(TrainerConfig, good, [f"ranks={ranks}", "student.device=cpu"])
    threads = jobs.split_threads(cfg, with_servers=with_teacher)
    assert (threads.server, threads.rank) == expected


def test_ranks_are_one_per_gpu_unless_the_file_says(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert jobs.num_ranks(jobs.config.load(TrainerConfig, good)) == 3
    assert jobs.num_ranks(jobs.config.load(TrainerConfig, good, ["student.device=cpu"])) == 1
    assert jobs.num_ranks(jobs.config.load(TrainerConfig, good, ["ranks=2"])) == 2


def test_precompute_takes_a_configuration_that_lacks_nothing(good: Path) -> None:
    (good.parent / "train.jsonl").unlink()
    result = run("precompute", str(good))
    assert result.exit_code == 2
    assert "data.train.path" in result.output
