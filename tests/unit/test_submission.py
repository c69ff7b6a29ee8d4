"""What is checked of a configuration before it becomes a job of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdmesh.commands import submission
from kdmesh.commands.submission import Wishes
from kdmesh.config import load
from kdmesh.errors import ConfigError
from kdmesh_trainer.config import TrainerConfig

WISHES: dict[str, Any] = {
    "nodes": 1,
    "gpus": 0,
    "image": "trainer:1",
    "volumes": ("models:/models", "data:/data"),
    "secrets": ("teacher-token:/secrets/teacher",),
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tree = {
        "output": "runs/My.Student",
        "steps": 10,
        "student": {"model": "/models/student"},
        "teacher": {"addresses": ["teacher.ml:50051"]},
        "data": {"train": {"format": "chat", "path": "/data/train.jsonl"}},
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def refused(path: Path, *overrides: str, **wishes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        submission.plan(path, overrides, Wishes(**{**WISHES, **wishes}), "Job")
    return str(error.value)


def test_a_job_is_named_after_its_output_and_gets_resources_for_its_ranks(config: Path) -> None:
    made = submission.plan(config, (), Wishes(**{**WISHES, "gpus": 4}), "Job")
    assert made.name == "my-student"
    assert (made.resources.cpus, made.resources.memory) == ("16", "128Gi")
    assert made.output_path == "/work/runs/My.Student"
    assert made.output.claim == "my-student-output"


def test_everything_that_is_wrong_is_told_at_once(config: Path) -> None:
    said = refused(
        config,
        "output=/elsewhere/run",
        "student.model=models/student",
        "student.device=cuda",
        "data.chat_template=/templates/chat.jinja",
        "teacher.addresses=['127.0.0.1:50051', 'teacher:50051']",
        "teacher.access.token_file=/secrets/teacher/token",
        "ranks=2",
    )
    assert said.startswith(f"{config}: 7 things are wrong for a job in a cluster\n")
    for words in (
        "output: /elsewhere/run is on no volume that can be written to",
        "student.model: models/student would lie on the claim run-output, which is empty at first",
        "student.device is cuda, and --gpus is 0",
        "data.chat_template: /templates/chat.jinja is on no --volume and no --secret",
        "127.0.0.1:50051 is the job's own node",
        "without tls the token would travel in the clear",
        "ranks is 2, and with --gpus 0 each node has 1",
    ):
        assert words in said


def test_what_lies_in_a_given_claim_or_in_the_image_is_taken(config: Path) -> None:
    overrides = ("student.model=models/student", "data.chat_template=/opt/templates/chat.jinja")
    made = submission.plan(config, overrides, Wishes(**WISHES, claim="mine", in_image=("/opt/templates",)), "Job")
    assert made.output.size is None
    assert "models/../../opt" in refused(config, "student.model=models/../../opt", claim="mine")


@pytest.mark.parametrize("directory", ["tokens", "/work/tokens", "/tmp/tokens", "/kept/tokens"])
def test_token_ids_lie_wherever_a_node_may_write(config: Path, directory: str) -> None:
    wishes = Wishes(**{**WISHES, "volumes": (*WISHES["volumes"], "kept:/kept:rw")})
    made = submission.plan(config, (f"data.token_cache.directory={directory}",), wishes, "Job")
    assert directory in made.config


@pytest.mark.parametrize("directory", ["/data/tokens", "/var/tmp/tokens", "../tokens"])
def test_token_ids_are_not_put_where_no_node_may_write(config: Path, directory: str) -> None:
    said = refused(config, f"data.token_cache.directory={directory}", in_image=("/var/tmp",))
    assert f"data.token_cache.directory: {directory} is on no volume that can be written to" in said


@pytest.mark.parametrize("wish", ["storage", "storage_class"])
def test_what_a_claim_is_made_with_does_not_go_with_one_that_is_there(config: Path, wish: str) -> None:
    option = f"--{wish.replace('_', '-')}"
    assert f"{option} is for a claim that is made" in refused(config, claim="mine", **{wish: "1Ti"})


def test_servers_that_are_needed_are_named(config: Path) -> None:
    assert "teacher.addresses is empty" in refused(config, "teacher.addresses=[]")
    sampled = ("source={kind: on_policy}", "data.max_tokens=512", "batch.max_tokens=1024")
    assert "source.rollouts.addresses is empty" in refused(config, *sampled)
    judged = ("objective={name: sft}", "data.held_out={format: chat, path: /data/held_out.jsonl}")
    assert "teacher.addresses is empty" in refused(config, "teacher.addresses=[]", *judged)
    made = submission.plan(config, ("objective={name: sft}", "teacher.addresses=[]"), Wishes(**WISHES), "Job")
    assert not made.asks_cluster


@pytest.mark.parametrize("key", ["context", "shard_ranks"])
def test_ranks_that_cannot_share_a_student_are_told_before_they_are_started(config: Path, key: str) -> None:
    for nodes, gpus in ((1, 4), (4, 2)):
        wanted = Wishes(**{**WISHES, "nodes": nodes, "gpus": gpus})
        with pytest.raises(ConfigError, match=rf"parallel.{key} is 3 and the job has {nodes * gpus} ranks"):
            submission.plan(config, (f"parallel.{key}=3",), wanted, "JobSet")
    made = submission.plan(config, (f"parallel.{key}=6",), Wishes(**{**WISHES, "nodes": 3, "gpus": 2}), "JobSet")
    assert made.nodes == 3


def test_metrics_must_be_readable_from_outside_the_pod(config: Path) -> None:
    said = refused(config, "metrics={port: 0}")
    assert "metrics.host is 127.0.0.1, which nobody reaches from outside the pod" in said
    assert "metrics.port is 0" in said
    taken = ("metrics={port: 29500, host: 0.0.0.0}",)
    with pytest.raises(ConfigError, match="29500, where the nodes of a job meet"):
        submission.plan(config, taken, Wishes(**{**WISHES, "nodes": 2}), "JobSet")
    assert submission.plan(config, taken, Wishes(**WISHES), "Job").metrics_port == 29500
    made = submission.plan(config, ("metrics={port: 8071, host: 0.0.0.0}",), Wishes(**WISHES), "Job")
    assert made.metrics_port == 8071
    assert submission.plan(config, (), Wishes(**WISHES), "Job").metrics_port is None


def test_what_configures_a_server_is_not_submitted(tmp_path: Path) -> None:
    path = tmp_path / "teacher.yaml"
    path.write_text("engine: {kind: transformers, model: teacher}\n", encoding="utf-8")
    assert "is a teacher configuration; what is wanted here is a trainer's" in refused(path)


@pytest.mark.parametrize(
    ("wish", "value", "words"),
    [
        ("volumes", "models", "--volume 'models' is not of the form CLAIM:/path"),
        ("volumes", "models:/models:x", "--volume 'models:/models:x' is not of the form"),
        ("secrets", "token", "--secret 'token' is not of the form SECRET:/path"),
        ("secret_variables", "KEY=secret", "--secret-env 'KEY=secret' is not of the form NAME=SECRET/KEY"),
        ("variables", "KEY", "--env 'KEY' is not of the form NAME=VALUE"),
        ("variables", "WANDB_API_KEY=a", "say --secret-env WANDB_API_KEY=SECRET/KEY"),
        ("variables", "AWS_SECRET_ACCESS_KEY=a", "--env AWS_SECRET_ACCESS_KEY looks like a secret"),
        ("resources", "rdma/ib", "--resource 'rdma/ib' is not of the form NAME=AMOUNT"),
    ],
)
def test_words_of_the_wrong_form_are_told_the_right_one(config: Path, wish: str, value: str, words: str) -> None:
    assert words in refused(config, **{wish: (value,)})


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"volumes": ("My_Models:/models",)}, "'My_Models' cannot be the name of a claim"),
        ({"secrets": ("token:/etc/kdmesh/token",)}, "mounted at /etc/kdmesh/token: nothing can be written to"),
        ({"secret_variables": ("KEY=My.Secret/key",)}, "'My.Secret' cannot be the name of a secret"),
        ({"variables": ("MY KEY=1",)}, "'MY KEY' cannot be the name of an environment variable"),
        ({"variables": ("1KEY=1",)}, "'1KEY' cannot be the name of an environment variable"),
        ({"variables": ("PET_NNODES=4",)}, "the environment variable PET_NNODES is the job's own"),
        ({"variables": ("A=1",), "secret_variables": ("A=s/k",)}, "the environment variable A is given twice"),
        ({"node_labels": ("a b=c",)}, "'a b' cannot be the key of a label"),
        ({"node_labels": ("Example.com/gpu=c",)}, "'Example.com/gpu' cannot be the key of a label"),
        ({"node_labels": ("gpu=an h200",)}, "'an h200' cannot be the value of a label"),
        ({"node_labels": (f"gpu={'h' * 64}",)}, "cannot be the value of a label"),
        ({"tolerated": ("a:b:NoSchedule",)}, "'b:NoSchedule' is no effect"),
        ({"resources": ("rdma ib=1",)}, "'rdma ib' cannot be the name of a resource"),
        ({"resources": ("memory=1Gi",)}, "memory is not a resource of its own: say --memory"),
        ({"claim": "Mine"}, "'Mine' cannot be the name of a claim"),
        ({"storage_class": "fast disk"}, "'fast disk' cannot be the name of a storage class"),
        ({"service_account": "a/b"}, "'a/b' cannot be the name of a service account"),
        ({"pull_secret": "-a"}, "'-a' cannot be the name of a secret"),
        ({"queue": "a_b"}, "'a_b' cannot be the name of a queue"),
    ],
)
def test_what_the_cluster_would_refuse_is_refused_before_anything_is_sent(
    config: Path, wishes: dict[str, Any], words: str
) -> None:
    assert words in refused(config, **wishes)


def test_a_text_that_looks_like_a_number_travels_as_a_text(config: Path, tmp_path: Path) -> None:
    made = submission.plan(config, ("output='1e5'",), Wishes(**{**WISHES, "name": "student"}), "Job")
    travelled = tmp_path / "travelled.yaml"
    travelled.write_text(made.config, encoding="utf-8")
    assert load(TrainerConfig, travelled).output == Path("1e5")


def test_the_example_is_submitted_as_it_says() -> None:
    path = Path(__file__).parents[2] / "examples/train-in-cluster.yaml"
    made = submission.plan(path, (), Wishes(**{**WISHES, "nodes": 2, "gpus": 8}), "JobSet")
    assert made.name == "in-cluster"
    assert made.asks_cluster


def test_taints_are_said_as_kubectl_says_them(config: Path) -> None:
    said = ("dedicated=research:NoSchedule", "spot", "a/b:NoExecute", "empty=")
    made = submission.plan(config, (), Wishes(**{**WISHES, "tolerated": said}), "Job")
    assert [(one.key, one.value, one.effect) for one in made.tolerated] == [
        ("dedicated", "research", "NoSchedule"),
        ("spot", None, None),
        ("a/b", None, "NoExecute"),
        ("empty", "", None),
    ]
    assert "'Never' is no effect of a taint, as NoSchedule" in refused(config, tolerated=("spot:Never",))
    assert "--tolerate '=x' is not of the form" in refused(config, tolerated=("=x",))
