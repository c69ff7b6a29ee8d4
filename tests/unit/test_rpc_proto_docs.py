"""The proto files are the specification: everything in them is documented."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "proto").rglob("*.proto"))
SYNTAX = 12  # field number of `syntax` in FileDescriptorProto: its comment is the file's


def described(root: Path, path: Path, into: Path) -> FileDescriptorProto:
    """The file as protoc sees it, comments included."""
    out = into / "set.pb"
    well_known = resources.files("grpc_tools") / "_proto"
    status = protoc.main(
        ["protoc", f"-I{root}", f"-I{well_known}", "--include_source_info", f"--descriptor_set_out={out}", str(path)]
    )
    assert status == 0
    (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
    return file


Elements = Iterator[tuple[tuple[int, ...], str]]


def elements(file: FileDescriptorProto) -> Elements:
    """Path in the descriptor, and name, of everything that needs a comment."""
    yield (SYNTAX,), file.name
    for i, message in enumerate(file.message_type):
        yield from of_message((4, i), message)
    for i, enum in enumerate(file.enum_type):
        yield from of_enum((5, i), enum)
    for i, service in enumerate(file.service):
        yield (6, i), service.name
        for k, method in enumerate(service.method):
            yield (6, i, 2, k), f"{service.name}.{method.name}"


def of_message(path: tuple[int, ...], message: DescriptorProto) -> Elements:
    yield path, message.name
    for i, field in enumerate(message.field):
        yield (*path, 2, i), f"{message.name}.{field.name}"
    made_up = {field.oneof_index for field in message.field if field.proto3_optional}
    for i, oneof in enumerate(message.oneof_decl):
        if i not in made_up:
            yield (*path, 8, i), f"{message.name}.{oneof.name}"
    for i, nested in enumerate(message.nested_type):
        yield from of_message((*path, 3, i), nested)
    for i, enum in enumerate(message.enum_type):
        yield from of_enum((*path, 4, i), enum)


def of_enum(path: tuple[int, ...], enum: EnumDescriptorProto) -> Elements:
    yield path, enum.name
    for i, value in enumerate(enum.value):
        yield (*path, 2, i), f"{enum.name}.{value.name}"


def undocumented(file: FileDescriptorProto) -> set[str]:
    comments = {tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location}
    return {name for path, name in elements(file) if not comments.get(path)}


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_everything_has_a_comment(path: Path, tmp_path: Path) -> None:
    assert undocumented(described(ROOT / "proto", path, tmp_path)) == set()


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_a_deleted_comment_is_noticed(path: Path, tmp_path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"(^[ ]*//.*\n)+", source, re.MULTILINE))
    copy = tmp_path / path.relative_to(ROOT / "proto")
    copy.parent.mkdir(parents=True)
    for other in PROTOS:
        if other != path:
            (copy.parent / other.name).write_text(other.read_text(encoding="utf-8"), encoding="utf-8")
    for block in blocks:
        copy.write_text(source[: block.start()] + source[block.end() :], encoding="utf-8")
        assert undocumented(described(tmp_path, copy, tmp_path)), block.group()


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_enums_start_unspecified(path: Path, tmp_path: Path) -> None:
    for enum in described(ROOT / "proto", path, tmp_path).enum_type:
        assert enum.value[0].name.endswith("_UNSPECIFIED")
        assert enum.value[0].number == 0


def test_every_rpc_says_its_errors(tmp_path: Path) -> None:
    for path in PROTOS:
        file = described(ROOT / "proto", path, tmp_path)
        comments = {tuple(location.path): location.leading_comments for location in file.source_code_info.location}
        for at, name in elements(file):
            if at[0] == 6 and len(at) == 4:
                assert re.search(r"^ (Errors:|The stream itself ends with:)", comments[at], re.MULTILINE), name
