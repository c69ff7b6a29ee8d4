"""Holds who may import whom, and the few rules that keep files small and findable."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "kdmesh": ROOT / "kdmesh",
    "kdmesh_teacher": ROOT / "services/teacher_server/kdmesh_teacher",
    "kdmesh_rollout": ROOT / "services/rollout_server/kdmesh_rollout",
    "kdmesh_trainer": ROOT / "services/trainer/kdmesh_trainer",
}
SERVICES = set(PACKAGES) - {"kdmesh"}

# Every module or package of kdmesh and its layer; a new one must be given its place here.
LAYER = {
    "kdmesh": 0,
    "kdmesh.errors": 0,
    "kdmesh.types": 0,
    "kdmesh.allocator": 1,
    "kdmesh.allowance": 1,
    "kdmesh.auth": 1,
    "kdmesh.batching": 1,
    "kdmesh.chats": 1,
    "kdmesh.config": 1,
    "kdmesh.counting": 1,
    "kdmesh.exit_codes": 1,
    "kdmesh.extension": 1,
    "kdmesh.file_lock": 1,
    "kdmesh.hub": 1,
    "kdmesh.images": 1,
    "kdmesh.interrupt": 1,
    "kdmesh.job_names": 1,
    "kdmesh.log": 1,
    "kdmesh.open_files": 1,
    "kdmesh.outputs": 1,
    "kdmesh.parameter_names": 1,
    "kdmesh.plain_yaml": 1,
    "kdmesh.tokens": 1,
    "kdmesh.tracing": 1,
    "kdmesh.unix_path": 1,
    "kdmesh.v1": 1,
    "kdmesh.weight_files": 1,
    "kdmesh.groups": 2,
    "kdmesh.alignment": 2,
    "kdmesh.cluster": 2,
    "kdmesh.handles": 2,
    "kdmesh.losses": 2,
    "kdmesh.models": 2,
    "kdmesh.processor": 2,
    "kdmesh.rpc": 2,
    "kdmesh.sampling": 2,
    "kdmesh.serving": 2,
    "kdmesh.openai": 2,
    "kdmesh.sglang": 2,
    "kdmesh.weights": 2,
    # The composition root: starts services as processes, so it knows their configurations and nothing else of them.
    "kdmesh.answering": 4,
    "kdmesh.commands": 4,
    "kdmesh.demo": 4,
    "kdmesh.doctor": 4,
    "kdmesh.entry": 4,
    "kdmesh.launch": 4,
    "kdmesh.preflight": 4,
}
STRANGERS = [("kdmesh.rpc", "kdmesh.losses"), ("kdmesh.losses", "kdmesh.rpc")]
# Packages of packages -> those of their packages that each may know. What lies beside them may know all of them.
WITHIN: dict[str, dict[str, set[str]]] = {
    "kdmesh.handles": {"slab": set(), "rdma": {"slab"}, "doors": {"rdma", "slab"}},
    "kdmesh.rpc": {"fleet": set(), "weights": set(), "teachers": {"fleet"}, "rollouts": {"fleet"}},
    "kdmesh.serving": {"engine": set(), "jobs": set(), "http": {"engine", "jobs"}},
}
# What one hands to the other all the same: a value without behaviour of its own.
SHARED = {"kdmesh.losses.head.OutputHead"}
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc"}
HEAVY = {"torch", "grpc", "sglang", "transformers"}
MAX_LINES = 400


@dataclass(frozen=True)
class Module:
    """One source file of ours."""

    name: str  # dotted
    path: Path

    @property
    def unit(self) -> str:
        """What has a layer: a top-level module or package of kdmesh, or a whole service."""
        return ".".join(self.name.split(".")[:2]) if self.name.startswith("kdmesh.") else self.name.split(".")[0]

    @property
    def is_config(self) -> bool:
        return self.name.split(".")[-1].endswith("config")


@cache
def modules() -> tuple[Module, ...]:
    found = []
    for package, directory in PACKAGES.items():
        for path in sorted(directory.rglob("*.py")):
            parts = path.relative_to(directory).with_suffix("").parts
            found.append(Module(".".join([package, *(part for part in parts if part != "__init__")]), path))
    return tuple(module for module in found if not module.path.name.endswith(("_pb2.py", "_pb2_grpc.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(module: Module) -> Iterator[str]:
    """Dotted names that a file imports anywhere, inside functions too."""
    for node in ast.walk(tree(module.path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}: relative imports hide who imports whom"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(dotted: str) -> str | None:
    """The unit that an import reaches into; None when it is not ours."""
    parts = dotted.split(".")
    if parts[0] not in PACKAGES:
        return None
    if parts[0] != "kdmesh":
        return parts[0]
    unit = ".".join(parts[:2])
    return unit if unit in LAYER or len(parts) > 2 else "kdmesh"


def layer(unit: str) -> int:
    return 3 if unit in SERVICES else LAYER[unit]


def names(found: list[Module]) -> list[str]:
    return [module.name for module in found]


def test_every_module_of_kdmesh_has_a_layer() -> None:
    assert {module.unit for module in modules() if module.unit.split(".")[0] == "kdmesh"} <= set(LAYER)


@pytest.mark.parametrize("module", modules(), ids=names(list(modules())))
def test_nobody_imports_from_a_higher_layer(module: Module) -> None:
    for dotted in imports(module):
        unit = ours(dotted)
        if unit is not None and unit != module.unit:
            assert layer(unit) <= layer(module.unit), f"{module.name} imports {dotted}"


def test_the_services_never_import_each_other() -> None:
    for module in modules():
        if module.unit in SERVICES:
            others = SERVICES - {module.unit}
            assert not [dotted for dotted in imports(module) if ours(dotted) in others], module.name


def test_the_composition_root_knows_only_the_configurations_of_services() -> None:
    for module in modules():
        if layer(module.unit) == 4:
            reached = [dotted for dotted in imports(module) if ours(dotted) in SERVICES]
            assert all(is_configuration(dotted) for dotted in reached), module.name


def is_configuration(dotted: str) -> bool:
    """Whether an import is of a module that only says what a service can be told."""
    known = {module.name for module in modules()}
    parts = (dotted if dotted in known else dotted.rpartition(".")[0]).split(".")
    return "sections" in parts or parts[-1].endswith("config")


@pytest.mark.parametrize(("one", "other"), STRANGERS)
def test_strangers_stay_strangers(one: str, other: str) -> None:
    for module in modules():
        if module.unit == one:
            reached = {dotted for dotted in imports(module) if ours(dotted) == other}
            assert not reached - SHARED, module.name


@pytest.mark.parametrize("unit", WITHIN)
def test_packages_of_a_package_know_each_other_in_one_direction(unit: str) -> None:
    packages = {path.parent.name for path in (PACKAGES["kdmesh"] / unit.split(".")[1]).glob("*/__init__.py")}
    assert packages == set(WITHIN[unit])
    for module in modules():
        inside = module.name.split(".")[2:3]
        if module.unit == unit and inside and inside[0] in packages:
            reached = {dotted.split(".")[2] for dotted in imports(module) if ours(dotted) == unit} & packages
            assert reached - set(inside) <= WITHIN[unit][inside[0]], module.name


def test_grpc_is_known_only_to_rpc_and_servicers() -> None:
    allowed = {"kdmesh_teacher.servicer", "kdmesh_rollout.servicer"}
    for module in modules():
        if module.unit != "kdmesh.rpc" and module.name not in allowed:
            reached = [dotted for dotted in imports(module) if dotted.split(".")[0].startswith("grpc")]
            assert not reached, f"{module.name} imports {reached}"


def test_kubernetes_is_known_only_to_the_cluster_package() -> None:
    for module in modules():
        if module.unit != "kdmesh.cluster":
            reached = [dotted for dotted in imports(module) if dotted.split(".")[0] in ("kubernetes", "urllib3")]
            assert not reached, f"{module.name} imports {reached}"


def test_low_layers_know_neither_torch_nor_grpc() -> None:
    for module in modules():
        if layer(module.unit) <= 1:
            assert not [dotted for dotted in imports(module) if dotted.split(".")[0] in HEAVY], module.name


def test_losses_and_models_know_no_process_and_no_wire() -> None:
    for module in modules():
        if module.unit in ("kdmesh.losses", "kdmesh.models"):
            reached = {ours(dotted) for dotted in imports(module)}
            assert not reached & {"kdmesh.rpc", "kdmesh.handles", "kdmesh.v1"}, module.name


def test_only_files_that_name_sglang_import_it() -> None:
    for module in modules():
        if "sglang" not in module.name:
            assert not [dotted for dotted in imports(module) if dotted.split(".")[0] == "sglang"], module.name


def test_nothing_is_ever_unpickled() -> None:
    for module in modules():
        reached = {dotted.split(".")[0] for dotted in imports(module)}
        assert not reached & {"pickle", "cPickle", "cloudpickle", "dill", "shelve"}, module.name


def test_configurations_load_nothing_heavy() -> None:
    configs = [module.name for module in modules() if module.is_config]
    assert len(configs) >= 9
    for name in [*configs, "kdmesh.commands.cli", "kdmesh.preflight.check", "kdmesh.launch.jobs"]:
        script = f"import sys, {name}; print(*sorted({HEAVY!r} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        assert done.stdout.split() == [], name


def test_a_teacher_server_loads_torch_only_for_an_engine_that_needs_it() -> None:
    script = "import sys, kdmesh_teacher.lifecycle, kdmesh_teacher.fake_engine; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_no_file_has_a_name_that_says_nothing() -> None:
    every = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), *(module.path for module in modules())]
    assert not [path for path in every if path.stem in FORBIDDEN_NAMES or path.parent.name in FORBIDDEN_NAMES]


def test_every_file_starts_by_saying_its_one_job() -> None:
    for module in modules():
        text = ast.get_docstring(tree(module.path))
        assert text, f"{module.path} has no docstring"


def test_every_file_postpones_annotations() -> None:
    for module in modules():
        if module.path.name != "__init__.py":
            assert "__future__.annotations" in set(imports(module)), module.name


def test_no_file_is_too_long() -> None:
    for module in modules():
        assert len(module.path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, module.name


def test_nobody_prints() -> None:
    for module in modules():
        calls = [node for node in ast.walk(tree(module.path)) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], module.name
