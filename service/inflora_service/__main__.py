"""``python -m inflora_service``: the server's command line."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from inflora_core import logs
from inflora_core.config import PRESETS, Gate, LearnConfig, Limits, Retention, preset
from inflora_core.errors import InfloraError, InvalidInputError
from inflora_core.logs import Format
from inflora_service import backbone_source
from inflora_service.configuring import FILE_VARIABLE, PREFIX, Parser
from inflora_service.examples import KeepExamples
from inflora_service.security import SecuritySettings
from inflora_service.server import HTTP_PORT, Settings, serve

log = logging.getLogger("inflora_service")

_LEARN_OPTIONS = (
    "epochs",
    "rank",
    "learning_rate",
    "batch_size",
    "seed",
    "held_out_share",
    "expected_tasks",
)
"""Fields of ``LearnConfig`` with an option of their own; ``--set`` reaches the others."""


_LIMIT_OPTIONS = {
    "predict_waiting_images": "most images of predictions that may wait",
    "upload_seconds": "how long an upload that broke off can be continued",
    "upload_idle_seconds": "longest wait for the next message of an upload",
    "task_attempts": "how often a worker may die of a task before it is set aside",
    "task_seconds": "longest time in work on a task; 0: any",
    "reserve_bytes": "what stays free on the disk, or nothing is accepted",
    "max_calls": "most calls at a time, but for health",
}
"""Fields of ``Limits`` with an option of their own."""

_SECURITY_FILES = {
    "tls_cert": "the server's certificate, and those of authorities between; PEM",
    "tls_key": "its private key, without a passphrase; PEM",
    "tls_client_ca": "who signs clients' certificates; every client needs one then",
    "tokens": "who may do what: principals with roles, hashes of tokens, names in certificates",
}
"""Fields of ``SecuritySettings`` that are files, read anew when they change."""
_LONGEST = 1_000_000.0
"""Seconds of a setting that gRPC takes in milliseconds, as a number of 32 bits."""

OFF = "off"
"""Instead of a limit: the check is left out."""

_GATE_OPTIONS = {
    "not_finite": "most numbers that may be NaN or infinite",
    "leak": "largest share of a layer's update in protected directions",
    "interference": "largest interference of a layer, where no canary images tell",
    "accuracy": "least accuracy of the task's own images, from 0 (chance) to 1",
    "distinct": "least share of a new class's images told from any one other class",
    "similar": "the same, but only for a warning in the task's report",
    "canary": "most accuracy on canary images of old classes that may be lost",
    "fp16": "least share of images named as by model.onnx for model.fp16.onnx to be handed out",
    "int8": "the same of model.int8.onnx",
    "form_distance": "most that the probabilities of both may differ by on average",
}
"""Fields of ``Gate``."""


def _parser() -> Parser:
    parser = Parser(
        prog="inflora_service",
        description="A gRPC server for one image classifier that never stops learning.",
        epilog=f"Each option can also be set by a variable ({PREFIX}KEEP_VERSIONS for "
        "--keep-versions), or in the table [serve] of a file (keep-versions = 20). Flags come "
        "before variables, and both before the file. "
        "Example: inflora serve --store shop --port 50052",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    defaults = Settings(store=Path("inflora-store"))

    def add(group: Any, name: str, default: object, text: str, **more: Any) -> None:
        group.add_argument(name, default=default, help=text, **more)

    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"file (TOML) that sets options; also named by {FILE_VARIABLE}",
    )
    parser.add_argument(
        "--show-config",
        action="store_true",
        default=False,
        help="say which options hold, and where each comes from, and end",
    )

    group = parser.add_argument_group("store")
    add(group, "--store", defaults.store, "folder of the store, made if there is none", type=Path)
    group.add_argument(
        "--backbone",
        type=_named,
        help=f"what a new store is made with: {backbone_source.DEFAULT} (as without this option), "
        "a timm or hf-hub: name, or a safetensors file",
    )
    group.add_argument("--architecture", help="timm's name, where a weights file has none")

    group = parser.add_argument_group("network")
    add(group, "--host", defaults.host, "address to listen on")
    add(group, "--port", defaults.port, "port to listen on; 0: any free one", type=_port)
    group.add_argument(
        "--health-port",
        type=_port,
        help="port on which health alone is answered, in the clear, for probes that speak no TLS; "
        "0: any free one",
    )
    add(
        group,
        "--max-connection-age-seconds",
        defaults.max_connection_age_seconds,
        "after this long a client is asked to connect again, so that it finds servers that came "
        "meanwhile; calls that run go on; 0: never",
        type=_age,
        metavar="SECONDS",
    )
    group.add_argument(
        "--ready-file",
        type=Path,
        help="file to write the address to, host:port, once the server listens",
    )
    add(
        group,
        "--drain-seconds",
        defaults.drain_seconds,
        "how long running calls may take after SIGTERM",
        type=float,
    )

    add(
        group,
        "--http-port",
        defaults.http_port,
        f"port for metrics and probes by HTTP; 0: any free one; auto: {HTTP_PORT}, or none where "
        f"that is taken; {OFF}: none",
        type=_http_port,
        metavar="PORT",
    )
    add(
        group,
        "--http-host",
        defaults.http_host,
        "address for that; metrics and probes ask for no credentials",
    )
    add(
        group,
        "--console",
        "on",
        "a page for people on that port, for this machine alone; it asks for what calls do",
        choices=("on", OFF),
    )

    group = parser.add_argument_group("several servers: one learns, others predict")
    add(
        group,
        "--role",
        defaults.role,
        "what it does; a predictor follows a shared store, and its own is a copy of that",
        choices=("all", "learner", "predictor"),
    )
    group.add_argument(
        "--shared",
        type=_url,
        metavar="URL",
        help="where a learner publishes and predictors look: s3://bucket/prefix, gs://..., "
        "az://... or file:///folder",
    )
    group.add_argument(
        "--take-over",
        action="store_true",
        default=False,
        help="take the place of the learner that publishes there, and fetch all that it published",
    )
    add(
        group,
        "--poll-seconds",
        defaults.poll_seconds,
        "from one look of a predictor at the shared store to the next",
        type=_seconds,
    )
    add(
        group,
        "--cache-bytes",
        defaults.cache_bytes,
        "what a predictor keeps of the shared store's files; 0: all that it fetched",
        type=_count,
    )

    group = parser.add_argument_group(
        "security (docs/security.md): without credentials only loopback is listened on"
    )
    for name, text in _SECURITY_FILES.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="FILE", help=text)
    group.add_argument(
        "--insecure",
        action="store_true",
        default=False,
        help="listen to other machines without asking who they are, or take tokens in the clear",
    )

    group = parser.add_argument_group("learning, where a task asks for nothing else")
    add(group, "--preset", "default", "named settings to start from", choices=sorted(PRESETS))
    for name in _LEARN_OPTIONS:
        group.add_argument(f"--{name.replace('_', '-')}", help=f"setting {name}")
    group.add_argument(
        "--set",
        action="append",
        dest="assignments",
        metavar="KEY=VALUE",
        help="any other setting; can be given more than once",
    )
    add(group, "--device", defaults.device, "where to learn", choices=("auto", "cpu", "cuda"))
    add(
        group,
        "--learn-precision",
        defaults.learn_precision,
        "what training multiplies matrices in; auto: bfloat16 where the hardware does, but not "
        "on a processor with --learn-memory-bytes",
        choices=("auto", "float32", "bfloat16"),
    )
    group.add_argument(
        "--learn-deterministic",
        action="store_true",
        default=False,
        help="have a GPU learn the same bits twice, slower; CPUs always do",
    )
    add(
        group,
        "--learn-launcher",
        defaults.learn_launcher,
        "start several processes that learn together, for example with "
        "'torchrun --standalone --nproc-per-node 8'",
        metavar="COMMAND",
    )
    add(group, "--learn-threads", 0, "threads of learning; 0: all processors but one", type=int)
    add(group, "--learn-memory-bytes", 0, "memory that learning may take; 0: any", type=int)
    add(
        group,
        "--learn-nice",
        defaults.learn_nice,
        "how far predictions come before learning, where both want a processor",
        type=int,
        choices=range(20),
        metavar="0-19",
    )

    group = parser.add_argument_group(
        "the publish gate: a version over one of these limits is kept, but does not answer"
    )
    for name, text in _GATE_OPTIONS.items():
        default = getattr(defaults.gate, name)
        add(
            group,
            f"--gate-{name.replace('_', '-')}",
            OFF if default is None else default,
            f"{text}; {OFF}: do not look",
            metavar="LIMIT",
        )

    add(
        group,
        "--canary-images",
        defaults.canary_images,
        "images of each new class to keep, to see what later tasks cost it; 0: none, and those "
        "that were kept are deleted",
        type=_count,
    )

    group = parser.add_argument_group("predicting")
    add(group, "--provider", defaults.provider, "what predicts", choices=("auto", "cpu", "cuda"))
    add(group, "--predict-threads", 0, "threads of predictions; 0: one a processor", type=_count)
    add(
        group,
        "--predict-runs",
        defaults.predict_runs,
        "runs of the model on the CPU that share them when several calls wait; 0: one a thread",
        type=_count,
    )

    add(
        group,
        "--predict-precision",
        defaults.predict_precision,
        "of the backbone on a GPU; float16 is faster and less exact than the exported file",
        choices=("float32", "float16"),
    )

    group = parser.add_argument_group(
        "what is kept of versions, beside the current one and pinned ones"
    )
    add(
        group,
        "--keep-versions",
        defaults.retention.versions,
        "newest versions that can be used; 0: all",
        type=_count,
    )
    add(
        group,
        "--keep-onnx",
        defaults.retention.onnx_files,
        "newest versions whose model.onnx stays; others' is made again when asked for; 0: all",
        type=_count,
    )

    group = parser.add_argument_group("uploads and the disk")
    add(
        group,
        "--keep-examples",
        defaults.keep_examples,
        "how long examples are kept once their task has ended",
        choices=get_args(KeepExamples),
    )
    for name, text in _LIMIT_OPTIONS.items():
        default = getattr(defaults.limits, name)
        add(group, f"--{name.replace('_', '-')}", default, text, type=type(default))

    levels = ("debug", "info", "warning", "error")
    add(parser, "--log-level", "info", "least severe messages to log", choices=levels)
    add(
        parser,
        "--log-format",
        defaults.log_format,
        "json: a line of JSON for each message, with the ids of call, task and version",
        choices=get_args(Format),
    )
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _port(text: str) -> int:
    """Refuse what is no port: one above 65535 would be taken for what is left of it."""
    if not text.isdecimal() or not int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, 0 to 65535")
    return int(text)


def _http_port(text: str) -> int | str:
    return text if text in ("auto", OFF) else _port(text)


def _age(text: str) -> float:
    number = float(text)
    if not 0 <= number <= _LONGEST:  # NaN is not, either
        raise ValueError
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise ValueError
    return seconds


def _url(text: str) -> str:
    """Refuse a URL that was left empty: a learner would publish nowhere."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: name a shared store (s3://bucket/prefix, ...)")
    return text


def _named(text: str) -> str:
    """Refuse a name that was left empty: it would be taken for none, which is the bundled one."""
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "is empty: name a backbone (a timm or hf-hub: name, or a safetensors file)"
        )
    return text


def _learn_config(arguments: argparse.Namespace) -> LearnConfig:
    changes: dict[str, str] = {}
    for assignment in getattr(arguments, "assignments", []):
        key, separator, value = assignment.partition("=")
        if not separator:
            raise InvalidInputError(f"--set takes KEY=VALUE, not {assignment!r}")
        changes[key] = value
    for name in _LEARN_OPTIONS:
        if hasattr(arguments, name):
            changes[name] = getattr(arguments, name)
    return preset(arguments.preset).updated(**changes)


def _limits(arguments: argparse.Namespace) -> Limits:
    try:
        return Limits.model_validate({name: getattr(arguments, name) for name in _LIMIT_OPTIONS})
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise InvalidInputError(f"--{option}: {first['msg']}") from error


def _gate(arguments: argparse.Namespace) -> Gate:
    limits = {name: getattr(arguments, f"gate_{name}") for name in _GATE_OPTIONS}
    try:
        return Gate.model_validate(
            {name: None if limit == OFF else limit for name, limit in limits.items()}
        )
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--gate-{str(first['loc'][0]).replace('_', '-')}"
        raise InvalidInputError(f"{option}: {first['msg']}, or {OFF}") from error


def _security(arguments: argparse.Namespace) -> SecuritySettings:
    files: dict[str, Any] = {name: getattr(arguments, name, None) for name in _SECURITY_FILES}
    return SecuritySettings(**files, insecure=arguments.insecure)


def _settings(arguments: argparse.Namespace) -> Settings:
    return Settings(
        store=arguments.store,
        backbone=getattr(arguments, "backbone", None),
        architecture=getattr(arguments, "architecture", None),
        host=arguments.host,
        port=arguments.port,
        http_host=arguments.http_host,
        http_port=arguments.http_port,
        console=arguments.console != OFF,
        log_format=arguments.log_format,
        health_port=getattr(arguments, "health_port", None),
        max_connection_age_seconds=arguments.max_connection_age_seconds,
        learn=_learn_config(arguments),
        gate=_gate(arguments),
        canary_images=arguments.canary_images,
        retention=Retention(versions=arguments.keep_versions, onnx_files=arguments.keep_onnx),
        provider=arguments.provider,
        predict_threads=arguments.predict_threads,
        predict_runs=arguments.predict_runs,
        predict_precision=arguments.predict_precision,
        learn_threads=arguments.learn_threads,
        learn_memory_bytes=arguments.learn_memory_bytes,
        learn_nice=arguments.learn_nice,
        device=arguments.device,
        learn_precision=arguments.learn_precision,
        learn_deterministic=arguments.learn_deterministic,
        learn_launcher=arguments.learn_launcher,
        keep_examples=arguments.keep_examples,
        limits=_limits(arguments),
        drain_seconds=arguments.drain_seconds,
        role=arguments.role,
        shared=getattr(arguments, "shared", ""),
        take_over=arguments.take_over,
        poll_seconds=arguments.poll_seconds,
        cache_bytes=arguments.cache_bytes,
        security=_security(arguments),
    )


def _announce(address: str, ready_file: Path | None) -> None:
    if ready_file is not None:
        draft = ready_file.with_name(f".{ready_file.name}.{os.getpid()}")
        draft.write_text(f"{address}\n")
        os.replace(draft, ready_file)
    log.info("ready; try: inflora learn FOLDER, then: inflora predict IMAGE (server %s)", address)


def _new_loop() -> asyncio.AbstractEventLoop:
    """Return a loop of uvloop, with which a call takes a third of a millisecond less.

    Where it is not installed, asyncio's own does.
    """
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def main() -> int:
    """Serve until a signal; return the exit status."""
    parser = _parser()
    arguments, origins = parser.settled(sys.argv[1:], os.environ)
    if arguments.show_config:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` has had enough: end without a word
        print(parser.shown(arguments, origins))
        return 0
    logs.configure(
        arguments.log_format,
        arguments.log_level.upper(),
        "server",
        "%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    ready_file = getattr(arguments, "ready_file", None)
    try:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)  # left by a server that was killed
        settings = _settings(arguments)
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            runner.run(serve(settings, lambda address: _announce(address, ready_file)))
    except (InfloraError, OSError) as error:
        if arguments.log_format == "json":
            log.critical("%s", error)
        else:
            sys.stderr.write(f"inflora_service: error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
