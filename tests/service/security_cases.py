"""Every rpc of a server with every kind of caller, and what each is to be told."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from inflora.oip.v2 import open_inference_pb2 as oip_pb
from inflora.v1 import learner_service_pb2 as learner_pb
from inflora.v1 import model_service_pb2 as model_pb
from inflora.v1 import predictor_service_pb2 as predictor_pb
from tests.certificates import Authority, Files
from tests.service.conftest import png

ROLES = ("predict", "learn", "admin")

_TASK = "models/default/tasks/none"
_VERSION = "models/default/versions/99"


@dataclass(frozen=True)
class Rpc:
    """One rpc.

    Attributes:
        role: The least that may call it; "" for anybody. Written down here once more, so that a
            slip in the server's table is seen.
        requests: What is sent.
        code: What whoever is let in is told.
    """

    role: str
    requests: tuple[Message, ...]
    code: str = "OK"


def _one(role: str, request: Message, code: str = "OK") -> Rpc:
    return Rpc(role, (request,), code)


RPCS: dict[str, Rpc] = {
    "/inflora.v1.LearnerService/LearnTask": Rpc("learn", (), "INVALID_ARGUMENT"),
    "/inflora.v1.LearnerService/QueryUpload": _one(
        "learn", learner_pb.QueryUploadRequest(request_id="none"), "NOT_FOUND"
    ),
    "/inflora.v1.LearnerService/ForgetClasses": _one(
        "admin", learner_pb.ForgetClassesRequest(), "INVALID_ARGUMENT"
    ),
    "/inflora.v1.LearnerService/UpdateClass": _one(
        "learn", learner_pb.UpdateClassRequest(), "INVALID_ARGUMENT"
    ),
    "/inflora.v1.LearnerService/WatchTask": _one(
        "learn", learner_pb.WatchTaskRequest(name=_TASK), "NOT_FOUND"
    ),
    "/inflora.v1.LearnerService/GetTask": _one(
        "learn", learner_pb.GetTaskRequest(name=_TASK), "NOT_FOUND"
    ),
    "/inflora.v1.LearnerService/ListTasks": _one("learn", learner_pb.ListTasksRequest()),
    "/inflora.v1.LearnerService/CancelTask": _one(
        "learn", learner_pb.CancelTaskRequest(name=_TASK), "NOT_FOUND"
    ),
    "/inflora.v1.LearnerService/RetryTask": _one(
        "learn", learner_pb.RetryTaskRequest(name=_TASK), "NOT_FOUND"
    ),
    "/inflora.v1.PredictorService/Predict": _one(
        "predict", predictor_pb.PredictRequest(images=[png()])
    ),
    "/inflora.v1.PredictorService/PredictStream": Rpc("predict", ()),
    "/inflora.v1.EvaluatorService/Evaluate": Rpc("predict", (), "INVALID_ARGUMENT"),
    "/inflora.v1.ModelService/ListVersions": _one("predict", model_pb.ListVersionsRequest()),
    "/inflora.v1.ModelService/GetVersion": _one(
        "predict", model_pb.GetVersionRequest(name="models/default/versions/current")
    ),
    "/inflora.v1.ModelService/PromoteVersion": _one(
        "admin", model_pb.PromoteVersionRequest(name=_VERSION), "NOT_FOUND"
    ),
    "/inflora.v1.ModelService/PinVersion": _one(
        "admin", model_pb.PinVersionRequest(name=_VERSION), "NOT_FOUND"
    ),
    "/inflora.v1.ModelService/UnpinVersion": _one(
        "admin", model_pb.UnpinVersionRequest(name=_VERSION), "NOT_FOUND"
    ),
    "/inflora.v1.ModelService/DownloadArtifact": _one(
        "predict", model_pb.DownloadArtifactRequest(name="models/default/versions/current")
    ),
    "/inference.GRPCInferenceService/ServerLive": _one("predict", oip_pb.ServerLiveRequest()),
    "/inference.GRPCInferenceService/ServerReady": _one("predict", oip_pb.ServerReadyRequest()),
    "/inference.GRPCInferenceService/ModelReady": _one(
        "predict", oip_pb.ModelReadyRequest(name="default")
    ),
    "/inference.GRPCInferenceService/ServerMetadata": _one(
        "predict", oip_pb.ServerMetadataRequest()
    ),
    "/inference.GRPCInferenceService/ModelMetadata": _one(
        "predict", oip_pb.ModelMetadataRequest(name="default")
    ),
    "/inference.GRPCInferenceService/ModelInfer": _one(
        "predict", oip_pb.ModelInferRequest(), "INVALID_ARGUMENT"
    ),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _one(
        "predict", reflection_pb2.ServerReflectionRequest(list_services="")
    ),
    "/grpc.health.v1.Health/Check": _one("", health_pb2.HealthCheckRequest()),
    "/grpc.health.v1.Health/Watch": _one("", health_pb2.HealthCheckRequest()),
    # grpc.aio's health service does not have it.
    "/grpc.health.v1.Health/List": _one("", health_pb2.HealthListRequest(), "UNIMPLEMENTED"),
}


@dataclass(frozen=True)
class Caller:
    """Somebody who calls.

    Attributes:
        port: Which server: ``tls``, or ``mtls``, which asks for certificates.
        role: Whose role they are found to have; "" for nobody's, None where there is no connection.
        authorization: What is sent as that metadata.
        files: Their certificate.
        trusts: Whose server certificates they believe; None talks in the clear.
    """

    port: str
    role: str | None
    authorization: str = ""
    files: Files | None = None
    trusts: Path | None = None

    def expected(self, rpc: Rpc) -> str:
        """Return the code that they are to be told."""
        if self.role is None:
            return "UNAVAILABLE"
        if not rpc.role:
            return rpc.code
        if not self.role:
            return "UNAUTHENTICATED"
        allowed = ROLES.index(self.role) >= ROLES.index(rpc.role)
        return rpc.code if allowed else "PERMISSION_DENIED"

    def channel(self, address: str) -> grpc.Channel:
        """Connect."""
        if self.trusts is None:
            return grpc.insecure_channel(address)
        chain = (self.files.key.read_bytes(), self.files.cert.read_bytes()) if self.files else ()
        credentials = grpc.ssl_channel_credentials(self.trusts.read_bytes(), *chain)
        return grpc.secure_channel(address, credentials)


@dataclass
class Scene:
    """Certificates, tokens, and the file that says who may do what."""

    folder: Path
    authority: Authority = field(init=False)
    server: Files = field(init=False)
    tokens: Path = field(init=False)
    callers: dict[str, Caller] = field(init=False)

    def __post_init__(self) -> None:
        self.authority = ours = Authority(self.folder, "ours")
        theirs = Authority(self.folder, "theirs")
        self.server = ours.issue("server")
        self.tokens = self.folder / "tokens.toml"
        self.tokens.write_text("".join(map(entry, ROLES)))
        self.certified = self.folder / "certified.toml"
        self.certified.write_text(
            "".join(entry(role, certificate=f"DNS:{role}.example") for role in ROLES)
        )
        admin, wrong = "Bearer token-of-admin", "Bearer token-of-admin2"
        callers = {
            "no token": Caller("tls", ""),
            "wrong token": Caller("tls", "", wrong),
            "empty token": Caller("tls", "", "Bearer "),
            "other scheme": Caller("tls", "", "Basic token-of-admin"),
            **{
                f"token of {role}": Caller("tls", role, f"bearer token-of-{role}") for role in ROLES
            },
            "who believes other servers": Caller("tls", None, admin, trusts=theirs.ca),
            "who talks in the clear": Caller("tls", None, admin, trusts=self.folder),
            **{
                f"certificate of {role}": Caller("mtls", role, files=ours.issue(role))
                for role in ROLES
            },
            "certificate of nobody": Caller("mtls", "", files=ours.issue("nobody")),
            "certificate of predict, token of admin": Caller(
                "mtls", "admin", admin, ours.issue("predict")
            ),
            "certificate of admin, wrong token": Caller("mtls", "", wrong, ours.issue("admin")),
            "expired certificate": Caller(
                "mtls", None, admin, ours.issue("admin", expired=True, file="expired")
            ),
            "certificate of another authority": Caller(
                "mtls", None, admin, theirs.issue("admin", file="theirs-admin")
            ),
            "no certificate": Caller("mtls", None, admin),
        }
        self.callers = {name: self._trusting(each) for name, each in callers.items()}

    def _trusting(self, caller: Caller) -> Caller:
        """Have a caller believe our servers, unless they are to believe others or none."""
        trusts = {None: self.authority.ca, self.folder: None}.get(caller.trusts, caller.trusts)
        return Caller(caller.port, caller.role, caller.authorization, caller.files, trusts)


def entry(role: str, name: str = "", certificate: str = "", quota: str = "") -> str:
    """Return a principal, with the token ``token-of-NAME``."""
    name = name or role
    digest = hashlib.sha256(f"token-of-{name}".encode()).hexdigest()
    return (
        f'[[principals]]\nname = "{name}"\nrole = "{role}"\ntoken_sha256 = ["{digest}"]\n'
        + (f'certificates = ["{certificate}"]\n' if certificate else "")
        + (f"quota = {{ {quota} }}\n" if quota else "")
    )


def told(channel: grpc.Channel, method: str, rpc: Rpc, authorization: str) -> str:
    """Call an rpc; return the name of the status that it ends with, "OK" at the first answer.

    Not with grpc.aio, which may lose the status of a call that is refused while it writes
    (grpc/grpc#36066).
    """
    # On the wire all kinds of rpcs are alike.
    stub = channel.stream_stream(method, request_serializer=lambda m: m.SerializeToString())
    metadata = (("authorization", authorization),) if authorization else ()
    call = stub(iter(rpc.requests), metadata=metadata, timeout=60)
    try:
        next(call, None)
    except grpc.RpcError:
        return str(call.code().name)
    finally:
        call.cancel()
    return "OK"


def wrong_of(scene: Scene, addresses: dict[str, str]) -> tuple[int, list[str]]:
    """Make every call as every caller; return how many those are, and what is not as it should be.

    Args:
        scene: The callers.
        addresses: Of the servers ``tls`` and ``mtls``; callers of others are left out.
    """
    cases, wrong = 0, []
    for name, caller in scene.callers.items():
        if caller.port not in addresses:
            continue
        with caller.channel(addresses[caller.port]) as channel:
            for method, rpc in RPCS.items():
                found, expected = (
                    told(channel, method, rpc, caller.authorization),
                    caller.expected(rpc),
                )
                cases += 1
                if found != expected:
                    wrong.append(f"{method}, {name}: {found}, not {expected}")
    return cases, wrong
