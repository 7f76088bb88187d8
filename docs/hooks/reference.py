"""The reference, made with the site: from the protos, the docstrings and the programs' help.

``make docs`` leaves what the programs say of themselves under ``build/docs``: they run in another
environment than this.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

PACKAGE = "inflora.v1"
HELP = "build/docs"
"""Where ``make docs`` puts the programs' help."""

_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
"""Numbers of what a file holds, in the paths of its comments."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of the reference."""
    root = Path(config.config_file_path).parent
    pages = {
        "grpc": _grpc(_protos(root)),
        "command-line": _commands(root),
        "server-options": _options(_read(root, "serve.txt")),
        "python": _api(root, "inflora_client", "Python client"),
        "edge": _api(root, "inflora_edge", "Devices in Python"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


# The programs.


def _read(root: Path, name: str) -> str:
    try:
        return (root / HELP / name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PluginError(f"there is no {HELP}/{name}: build the site with `make docs`") from error


def _commands(root: Path) -> str:
    """Return what typer says of ``inflora``, and the help of the programs that are not typer's."""
    lines = [_read(root, "inflora.md").rstrip()]
    for name in ("inflora doctor", "inflora-edge predict", "inflora-edge follow"):
        text = _read(root, f"{name.replace(' ', '-')}.txt")
        lines += ["", f"## `{name} --help`", "", "```text", text.rstrip(), "```"]
    return "\n".join([*lines, ""])


def _options(text: str) -> str:
    """Make a section of each group of options in the help of ``inflora serve``."""
    lines = ["# Server options", "", "What `inflora serve --help` says."]
    for section in re.split(r"^(?=\S.*:$)", text, flags=re.MULTILINE)[1:]:
        heading, _, options = section.partition("\n")
        lines += ["", f"## {heading.removesuffix(':')}", "", "```text", options.rstrip(), "```"]
    return "\n".join([*lines, ""])


# The protos.


def _protos(root: Path) -> list[FileDescriptorProto]:
    """Compile the protos, comments included."""
    buf = Path(sys.executable).with_name("buf")
    with tempfile.NamedTemporaryFile(suffix=".binpb") as image:
        command = [buf, "build", "--as-file-descriptor-set", "-o", image.name]
        made = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if made.returncode:
            raise PluginError(f"buf build: {made.stderr or made.stdout}")
        found = FileDescriptorSet.FromString(Path(image.name).read_bytes())
    return sorted((f for f in found.file if f.package == PACKAGE), key=lambda file: file.name)


def _grpc(protos: list[FileDescriptorProto]) -> str:
    services, types = [], []
    for proto in protos:
        said = _Comments(proto)
        for i, service in enumerate(proto.service):
            services += _service(service, said, (_SERVICE, i))
        for i, message in enumerate(proto.message_type):
            types += _message(message, said, (_MESSAGE, i))
        for i, enum in enumerate(proto.enum_type):
            types += _enum(enum, said, (_ENUM, i))
    head = [
        f"# gRPC API, `{PACKAGE}`",
        "",
        "Made from the comments of the `.proto` files. The server has reflection, too.",
        "",
    ]
    return "\n".join([*head, *services, "## Messages and enums", "", *types])


class _Comments:
    """The comments of a file, by the path of what they are about."""

    def __init__(self, proto: FileDescriptorProto) -> None:
        self._said = {tuple(at.path): at.leading_comments for at in proto.source_code_info.location}

    def block(self, path: tuple[int, ...]) -> str:
        """Return a comment as Markdown, where a list needs an empty line before it."""
        lines = [line.removeprefix(" ") for line in self._said.get(path, "").splitlines()]
        out: list[str] = []
        for line in lines:
            if line.startswith("- ") and out and out[-1] and not out[-1].startswith(("- ", "  ")):
                out.append("")
            out.append(line)
        return "\n".join(out)

    def cell(self, path: tuple[int, ...]) -> str:
        """Return a comment for the cell of a table."""
        return " ".join(self.block(path).split()).replace("|", "\\|")


def _service(
    service: ServiceDescriptorProto, said: _Comments, path: tuple[int, ...]
) -> Iterator[str]:
    yield from (f"## {service.name}", "", said.block(path), "")
    for i, rpc in enumerate(service.method):
        takes = f"{'stream of ' if rpc.client_streaming else ''}{_link(rpc.input_type)}"
        gives = f"{'stream of ' if rpc.server_streaming else ''}{_link(rpc.output_type)}"
        yield from (f"### {rpc.name}", "", f"{takes} → {gives}", "")
        yield from (said.block((*path, 2, i)), "")


def _message(
    message: DescriptorProto, said: _Comments, path: tuple[int, ...], outer: str = ""
) -> Iterator[str]:
    name = f"{outer}{message.name}"
    yield from (f"### {name}", "", said.block(path), "")
    if message.field:
        yield from ("| field | type | |", "|---|---|---|")
        for i, field in enumerate(message.field):
            about = said.cell((*path, 2, i))
            if field.HasField("oneof_index") and not field.proto3_optional:
                about = f"One of `{message.oneof_decl[field.oneof_index].name}`. {about}"
            yield f"| `{field.name}` = {field.number} | {_type(message, field)} | {about} |"
        yield ""
    for i, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message(nested, said, (*path, 3, i), f"{name}.")
    for i, enum in enumerate(message.enum_type):
        yield from _enum(enum, said, (*path, 4, i), f"{name}.")


def _enum(
    enum: EnumDescriptorProto, said: _Comments, path: tuple[int, ...], outer: str = ""
) -> Iterator[str]:
    yield from (f"### {outer}{enum.name}", "", said.block(path), "")
    yield from ("| value | |", "|---|---|")
    for i, value in enumerate(enum.value):
        yield f"| `{value.name}` = {value.number} | {said.cell((*path, 2, i))} |"
    yield ""


def _type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    for nested in message.nested_type:
        if nested.options.map_entry and field.type_name.endswith(f".{message.name}.{nested.name}"):
            key, value = (_scalar(part) for part in nested.field)
            return f"map of {key} to {value}"
    name = _scalar(field)
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _scalar(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return _link(field.type_name)
    return f"`{FieldDescriptorProto.Type.Name(field.type).removeprefix('TYPE_').lower()}`"


def _link(name: str) -> str:
    """Return a type's name, with a link where it is one of ours."""
    full = name.removeprefix(".")
    own = full.removeprefix(f"{PACKAGE}.")
    return f"`{full}`" if own == full else f"[`{own}`](#{own.lower().replace('.', '')})"


# The docstrings.


FIRST = "Client"
BASES = {"Client": "inflora_client._base.ClientBase"}
"""Where the arguments are described that a class takes from a base which is not exported."""

SECTIONS = {"errors": "Errors", "resources": "What the server answers"}
"""Headings for what comes from these modules of a package."""


def _api(root: Path, package: str, title: str) -> str:
    """Name all that a package exports, by where it comes from; mkdocstrings does the rest."""
    tree = ast.parse((root / "clients" / package / "__init__.py").read_text(encoding="utf-8"))
    sections: dict[str, list[str]] = {}
    for statement in ast.walk(tree):
        if isinstance(statement, ast.ImportFrom) and str(statement.module).startswith(package):
            module = str(statement.module).rpartition(".")[2]
            names = [alias.name for alias in statement.names]
            sections.setdefault(SECTIONS.get(module, "To begin with"), []).extend(names)
    lines = [f"# {title}", "", f"What `{package}` exports.", ""]
    for heading in ("To begin with", *SECTIONS.values()):
        if heading in sections:
            lines += [f"## {heading}", ""]
            for name in sorted(sections[heading], key=lambda name: name != FIRST):
                lines += [f"::: {package}.{name}", ""]
                if base := BASES.get(name):
                    lines += [f"::: {base}", "    options:", "      members: false", ""]
    return "\n".join(lines)
