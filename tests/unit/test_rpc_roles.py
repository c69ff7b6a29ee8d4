"""Every rpc of ours says what role it needs."""

from __future__ import annotations

from kdmesh.auth.identity import Role
from kdmesh.rpc import roles
from kdmesh.v1 import rollout_pb2, teacher_pb2


def test_the_table_lists_every_rpc_of_ours_and_no_other() -> None:
    for module, name in ((teacher_pb2, "Teacher"), (rollout_pb2, "Rollout")):
        service = module.DESCRIPTOR.services_by_name[name]
        listed = roles._ROLES[service.full_name]
        assert set(listed) == {method.name for method in service.methods}
        assert None not in listed.values()


def test_what_the_table_lacks_needs_an_operator() -> None:
    assert roles.needed("/kdmesh.v1.Teacher/Unheard") is Role.OPERATOR
    assert roles.needed("/elsewhere.Service/Method") is Role.OPERATOR
    assert roles.needed("nonsense") is Role.OPERATOR
