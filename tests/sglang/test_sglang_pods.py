"""A teacher over two nodes by the commands of the chart's LeaderWorkerSet, whose variables the test gives."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from kdmesh.rpc.teachers.pool import TeacherPool
from tests.support.chart_pods import mount, running
from tests.support.free_port import free_port
from tests.support.reference_rows import hugging_face_rows
from tests.support.rendered_chart import pods, rendered_with
from tests.support.sequences import random_sequences
from tests.support.sglang_teachers import sglang_environment, teacher_tree
from tests.support.teacher_process import await_ready, wait_event
from tests.support.tiny_models import VOCABULARY_SIZE, TinyModels

pytestmark = pytest.mark.sglang

_ANY_PORTS = ("--set", "server.port=0", "--set", "server.rest_port=0", "--set", "server.host=127.0.0.1")


def test_a_group_of_pods_gives_the_rows_of_one_model(
    tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model: Path = tiny_models.path("qwen3")
    tree = teacher_tree(model)
    engine = {key: value for key, value in tree["engine"].items() if key != "model"} | {"tensor_parallel": 2}
    manifests = rendered_with(
        "teacher.nodes=2",
        f'teacher.model.uri="{model}"',
        f"teacher.config.engine={json.dumps(engine)}",
        f"teacher.config.slab={json.dumps(tree['slab'])}",
        f"teacher.leaderWorkerSet.port={free_port()}",
        "test.enabled=false",
    )
    leader, worker = (pod for _, pod in pods(manifests))
    roots = [tmp_path_factory.mktemp("p") for _ in range(2)]
    for pod, root in zip((leader, worker), roots, strict=True):
        mount(pod, manifests, root)
    group = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "127.0.0.1"}
    variables = [group | {"LWS_WORKER_INDEX": str(index), "POD_NAME": f"demo-teacher-0-{index}"} for index in range(2)]
    environment = sglang_environment(SGLANG_CPU_OMP_THREADS_BIND="0|1")
    with (
        running(leader, roots[0], *_ANY_PORTS, variables=variables[0], environment=environment) as answering,
        running(worker, roots[1], *_ANY_PORTS, variables=variables[1], environment=environment) as following,
    ):
        wait_event(following, "listening")
        teacher = await_ready(answering)
        asked = random_sequences([33, 2, 200], vocabulary_size=VOCABULARY_SIZE, seed=1)
        with TeacherPool([teacher.grpc], job="test", door="shm", deadline_s=60) as pool:
            rows_RD = pool.submit(asked).wait().rows_RD
            expected_RD = hugging_face_rows(model, asked)
            assert (rows_RD - expected_RD).norm() < 1e-5 * expected_RD.norm()
        answering.send_signal(signal.SIGTERM)
        assert answering.wait(timeout=60) == 0
        _, errors = following.communicate(timeout=60)
        assert following.returncode != 0, errors  # its group is gone
