"""What values the chart takes, and what it says of those that it does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml
from pydantic import BaseModel

from tests.support.rendered_chart import ci_values, refusal, rendered_with
from tools import generate_helm
from tools.helm_chart import render
from tools.helm_chart.values import Values


def test_values_and_schema_are_those_of_the_models() -> None:
    for path, text in generate_helm.outputs().items():
        assert path.read_text("utf-8") == text, "run `make helm`"


def test_the_defaults_say_what_the_models_say() -> None:
    assert yaml.safe_load(generate_helm.values_yaml()) == Values().model_dump(by_alias=True)


def test_every_value_has_a_meaning() -> None:
    assert [
        name for model in _models(Values) for name, field in model.model_fields.items() if not field.description
    ] == []


def test_helm_refuses_the_defaults_with_what_is_missing() -> None:
    assert "nothing says who may use the servers" in render.template("helm4").stderr


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("treacher={}", "additional properties 'treacher' not allowed"),
        ("teacher.replica=2", "additional properties 'replica' not allowed"),
        ("teacher.config.slab.slot=2", "additional properties 'slot' not allowed"),
        ("teacher.config.slab.slots=0", "minimum: got 0, want 1"),
        ("teacher.config.engine.tensor_parallel=2", "additional properties 'tensor_parallel' not allowed"),
        ('teacher.config.engine={"kind":"vllm"}', "value must be one of 'fake', 'sglang', 'transformers'"),
        ('teacher.config.engine.model="/elsewhere"', "additional properties 'model' not allowed"),
        ('teacher.config.server.tls={"cert":"a","key":"b"}', "additional properties 'tls' not allowed"),
        ("teacher.config.server.allow_anonymous=true", "additional properties 'allow_anonymous' not allowed"),
        ('teacher.config.server.auth={"tokens":"/a"}', "additional properties 'tokens' not allowed"),
        ('teacher.config.cache={"directory":"/rows"}', "additional properties 'directory' not allowed"),
        ('rollout.config.slab={"slots":1}', "additional properties 'slab' not allowed"),
        ('teacher.config.jobs={"file":"/jobs"}', "additional properties 'file' not allowed"),
        ('teacher.jobs.overrides={"a":{"wait":2}}', "additional properties 'wait' not allowed"),
        ('rollout.jobs.overrides={"a":{"max_bytes_in_flight":2}}', "'max_bytes_in_flight' not allowed"),
        ('teacher.model.uri="s3://bucket"', "does not match pattern"),
        ('teacher.model.tokenSecret="hf_abc"', "got string, want object"),
        ('teacher.sharing.mode="hostIpc"', "value must be one of 'pod', 'claim', 'hostPath'"),
        ("podSecurity.runAsUser=0", "minimum: got 0, want 1"),
    ],
)
def test_the_schema_refuses(setting: str, sentence: str) -> None:
    assert sentence in refusal(setting)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ['teacher.jobs={"existingConfigMap":"mine","overrides":{"a":{"weight":2}}}'],
            "teacher.jobs.overrides and existingConfigMap are both set",
        ),
        (['nameOverride="qwen2.5"'], "all names begin with qwen2.5, and that of a Service"),
        (['nameOverride="7b"'], "all names begin with 7b, and that of a Service"),
        (["auth.allowAnonymous=false"], "nothing says who may use the servers"),
        (['auth.tokensSecret.name="tokens"'], "contradict each other"),
        (['teacher.model.uri=""'], "teacher.model.uri is empty: give hf://ORG/NAME"),
        (["rollout.enabled=true"], "rollout.model.uri is empty"),
        (["teacher.enabled=false"], "there is nothing to install"),
        (["teacher.gpus.perNode=1"], "teacher.gpus.perNode is 1, but engine.device is cpu"),
        (["teacher.replicas=2", "teacher.autoscaling.enabled=true"], "teacher.replicas is 2, but teacher.autoscaling"),
        (['teacher.autoscaling={"enabled":true,"minReplicas":5}'], "minReplicas 5 is more than maxReplicas 4"),
        (
            ['teacher.autoscaling={"enabled":true,"kind":"hpa","prometheusTokenSecret":{"name":"a"}}'],
            "are for keda, which autoscaling.enabled and kind switch on",
        ),
        (
            ['teacher.autoscaling={"enabled":true,"prometheusCaSecret":{"name":"a"}}'],
            "prometheusCaSecret.name needs prometheusTokenSecret.name",
        ),
        (
            ['teacher.autoscaling={"enabled":true,"prometheusTokenSecret":{"name":"a"}}'],
            "a token in prometheusTokenSecret goes to an https:// address only",
        ),
        (["teacher.config.slab.slots=64"], "takes 64 x 64 MiB, which is all of resources.limits.memory (4Gi) or more"),
        (['teacher.env={"HF_TOKEN":"hf_abc"}'], "teacher.env.HF_TOKEN looks like a secret"),
        (['teacher.env={"AWS_SECRET_ACCESS_KEY":"a"}'], "teacher.env.AWS_SECRET_ACCESS_KEY looks like a secret"),
        (
            ['teacher.env={"A":"1"}', 'teacher.secretEnv={"A":{"name":"a","key":"b"}}'],
            "teacher.env.A and secretEnv.A are both set",
        ),
        (
            ['teacher.podLabels={"app.kubernetes.io/instance":"other"}'],
            "teacher.podLabels.app.kubernetes.io/instance is a label of the chart's own",
        ),
        (
            ['tls.certManager={"duration":"24h","renewBefore":"1440m"}'],
            "tls.certManager.duration is 24h, and renewBefore 1440m",
        ),
        (['tls.certManager={"duration":"90 days"}'], 'unknown unit " days" in duration'),
        (["teacher.nodes=2"], "teacher.nodes is 2, but an engine of kind transformers works on one"),
        (["teacher.rowCache.enabled=true"], "teacher.config.cache.directory_mib go together"),
        (
            ['teacher.config.cache={"directory_mib":102400}', "teacher.rowCache.enabled=true"],
            "teacher.config.cache.directory_mib is 102400, which is all of teacher.rowCache.size (100Gi) or more",
        ),
        (
            ['teacher.config.server.auth={"jwt":{"issuer":"i","audience":"a","jwks":"/keys/jwks.json"}}'],
            "auth.allowAnonymous and teacher.config.server.auth contradict each other",
        ),
        (['teacher.config.cache={"directory_mib":5}'], "teacher.config.cache.directory_mib go together"),
        (['teacher.sharing.mode="claim"'], "name a claim on a local volume in existingClaim"),
        (["teacher.sharing.prepare=true"], "teacher.sharing.prepare is for mode hostPath, not pod"),
        (['tls.clientCaSecret.name="ca"'], "tls.clientCaSecret.name needs a certificate of the server"),
        (["teacher.config.server.rdma=true"], "teacher.config.server.rdma needs TLS and identities"),
        (["teacher.config.server.port=0"], "they must be fixed and two"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(settings: list[str], sentence: str) -> None:
    assert sentence in refusal(*settings)


@pytest.mark.parametrize(
    ("engine", "more", "sentence"),
    [
        ({"tensor_parallel": 8, "expert_parallel": 8}, {}, None),
        ({"tensor_parallel": 4, "data_parallel": 2}, {}, None),
        ({"tensor_parallel": 8, "data_parallel": 4, "arguments": {"enable_dp_attention": True}}, {}, None),
        ({"tensor_parallel": 4, "pipeline_parallel": 2}, {}, None),
        ({"tensor_parallel": 16}, {"teacher.nodes": 2}, None),
        ({"tensor_parallel": 4}, {}, "needs 4 GPUs in each pod, and gpus.perNode is 8"),
        ({"tensor_parallel": 16}, {}, "needs 16 GPUs in each pod, and gpus.perNode is 8"),
        (
            {"tensor_parallel": 8},
            {"teacher.nodes": 3},
            "teacher.nodes is 3 and engine.tensor_parallel 8: it must be a multiple",
        ),
        (
            {"tensor_parallel": 8, "pipeline_parallel": 2},
            {"teacher.nodes": 2},
            "pipeline_parallel and data_parallel must be 1",
        ),
    ],
)
def test_parallel_sizes_must_need_the_gpus_that_a_pod_has(
    engine: dict[str, object], more: dict[str, int], sentence: str | None
) -> None:
    import json

    settings = [
        f"teacher.config.engine={json.dumps({'kind': 'sglang', **engine, 'device': 'cuda'})}",
        "teacher.gpus.perNode=8",
    ]
    settings += [f"{key}={value}" for key, value in more.items()]
    if sentence is None:
        assert rendered_with(*settings)
    else:
        assert sentence in refusal(*settings)


def test_the_chart_is_of_the_version_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((render.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    chart = yaml.safe_load((render.CHART / "Chart.yaml").read_text("utf-8"))
    assert chart["appVersion"] == project["version"]


def test_a_cluster_that_is_too_old_is_refused() -> None:
    done = render.template("helm4", "--values", str(ci_values("anonymous-cpu")), kube_version="1.26")
    assert "chart requires kubeVersion: >=1.27" in done.stderr


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _models(field.annotation)
