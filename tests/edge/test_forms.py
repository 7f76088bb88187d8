"""Smaller forms of versions that were really learned: what they are, who may have them, and how."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from inflora_client import Client, NotFoundError
from inflora_core import forms, gate, graph, updates
from inflora_core.compute import Compute
from inflora_core.config import Gate
from inflora_core.errors import DamagedError, StateError
from inflora_core.forms import FORMS
from inflora_core.model import Agreement, Forget, Preprocessing
from inflora_core.progress import Tracker
from inflora_core.store import Store
from inflora_core.worker import Worker
from inflora_edge import Delta, Device, Model, Server, ServerError, apply
from inflora_service import derived as derived_files
from inflora_service.derived import Derived
from tests.core import tiny
from tests.edge.lineage import CLASSES, CONFIG, PARENTS
from tests.edge.scripted_server import ScriptedServer
from tests.running_server import RunningServer

COLOURS = [colour for colours in CLASSES.values() for colour in colours]


@pytest.fixture
def copy(store: Store, tmp_path: Path) -> Store:
    """The store, to be changed."""
    shutil.copytree(store.root, tmp_path / "copy")
    return Store.existing(tmp_path / "copy")


def weights(content: bytes) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load_from_string(content).graph.initializer}


# -- what they are ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", PARENTS)
def test_it_is_what_the_manifest_says(store: Store, number: int, form: str) -> None:
    (listed,) = [x for x in store.version(number).forms if x.file.name == forms.file_of(form)]
    made = updates.file(store, number, form)
    assert made.version == number
    assert hashlib.sha256(made.content).hexdigest() == listed.file.sha256
    assert len(made.content) == listed.file.size < len(store.onnx(number))
    assert listed.agreement.images >= 8
    assert listed.agreement.distance <= 0.05
    onnx.checker.check_model(made.content)
    card = graph.read_metadata(made.content)
    assert card.other == {"form": form}
    assert replace(card, other={}) == graph.read_metadata(store.onnx(number))


@pytest.mark.parametrize("form", FORMS)
def test_it_answers_as_the_whole_file_does(store: Store, tmp_path: Path, form: str) -> None:
    models = []
    for name, content in (("whole", store.onnx(4)), (form, updates.file(store, 4, form).content)):
        (tmp_path / name).write_bytes(content)
        models.append(Model(tmp_path / name))
    models[1].check()
    assert models[1].classes == models[0].classes
    for colour in COLOURS:
        one, other = (model.predict(tiny.png(colour, 30)) for model in models)
        assert one.label == other.label
        assert one.probabilities == pytest.approx(other.probabilities, abs=0.05)
        assert one.novelty == pytest.approx(other.novelty, abs=0.1)


def test_ort_files_are_made_of_it(store: Store, tmp_path: Path) -> None:
    """As docs/edge.md says: of what a device downloads, with onnxruntime's own tool."""
    path = tmp_path / "model.onnx"
    path.write_bytes(updates.file(store, 4, "int8").content)
    tool = "onnxruntime.tools.convert_onnx_models_to_ort"
    subprocess.run([sys.executable, "-m", tool, path], check=True, capture_output=True)
    whole, converted = Model(path), Model(path.with_suffix(".ort"))
    assert (converted.form, converted.version) == ("int8", 4)
    image = tiny.png("red", 30)
    assert converted.predict(image).probabilities == pytest.approx(
        whole.predict(image).probabilities, abs=1e-5
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_head_stays_exact(store: Store, form: str) -> None:
    before, after = weights(store.onnx(4)), weights(updates.file(store, 4, form).content)
    exact = [name for name in before if name.startswith(("head.", "novelty."))]
    assert "head.weight" in exact
    for name in exact:
        assert after[name] == before[name]


def test_integers_are_columns_of_weights_and_spare_the_first_block(store: Store) -> None:
    first, second = graph.read_metadata(store.onnx(4)).layers
    before, after = weights(store.onnx(4)), weights(updates.file(store, 4, "int8").content)
    for name in (graph.key_weight(first), graph.value_weight(first)):
        assert after[f"{name}.fp16"].data_type == TensorProto.FLOAT16
    for name in (graph.key_weight(second), graph.value_weight(second)):
        values = numpy_helper.to_array(before[name])
        integers = numpy_helper.to_array(after[f"{name}.int8"])
        scale = numpy_helper.to_array(after[f"{name}.scale"])
        assert integers.dtype == np.int8
        assert (np.abs(integers).max(axis=0) == 100).all(), "all of the range is used"
        assert (np.abs(integers * scale - values) <= scale / 2 * 1.001).all()
    stored = sum(numpy_helper.to_array(x).nbytes for x in after.values())
    assert stored < 0.6 * sum(numpy_helper.to_array(x).nbytes for x in before.values())


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(32, 40), st.integers(32, 40)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_what_sixteen_bits_have_no_number_for_stays(values: Any) -> None:
    content = backbone_of(helper.make_node("Mul", ["pixels", "w"], ["embedding"]), w=values)
    kept = weights(forms.halved(content))
    if np.abs(values).max() > np.finfo(np.float16).max:
        assert kept["w"].data_type == TensorProto.FLOAT
    else:
        narrow = numpy_helper.to_array(kept["w.fp16"])
        assert np.isfinite(narrow).all()
        assert np.allclose(narrow, values, rtol=2**-10, atol=2**-24)


def backbone_of(*nodes: onnx.NodeProto, **constants: Any) -> bytes:
    """Return the least that is taken for a version's file."""
    value = helper.make_tensor_value_info
    pixels = value("pixels", TensorProto.FLOAT, None)
    embedding = value("embedding", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [pixels], [embedding], initializers),
        opset_imports=[helper.make_opsetid("", graph.OPSET)],
        ir_version=graph.IR_VERSION,
    )
    size = Preprocessing(8, 8, 8, 8, "bicubic", "center", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    said = {"classes": ["a"], "tasks": ["t"], "layers": ["l"], "preprocessing": asdict(size)}
    helper.set_model_props(model, {key: json.dumps(value) for key, value in said.items()})
    content: bytes = model.SerializeToString()
    return content


def test_a_weight_of_two_products_is_there_once(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(64, 64)).astype(np.float32)
    content = backbone_of(
        helper.make_node("MatMul", ["pixels", "w"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("MatMul", ["y", "v"], ["z"]),
        helper.make_node("Add", ["z", "v"], ["embedding"]),
        w=values,
        v=values.T.copy(),
    )
    form = forms.quantised(content)
    # The other one is added to something, too.
    names = ["v.fp16", "w.int8", "w.scale", "int8.zero"]
    listed = onnx.load_from_string(form).graph.initializer
    assert sorted(tensor.name for tensor in listed) == sorted(names)
    pixels = generator.normal(size=(64, 64)).astype(np.float32)
    one, other = (
        ort.InferenceSession(x, providers=["CPUExecutionProvider"]).run(None, {"pixels": pixels})[0]
        for x in (content, form)
    )
    assert np.linalg.norm(one - other) < 0.03 * np.linalg.norm(one)


def test_a_column_of_zeros_stays_one() -> None:
    values = np.zeros((64, 64), np.float32)
    values[:, 1] = 2.0
    product = helper.make_node("MatMul", ["pixels", "w"], ["embedding"])
    kept = weights(forms.quantised(backbone_of(product, w=values)))
    integers, scale = (numpy_helper.to_array(kept[name]) for name in ("w.int8", "w.scale"))
    assert (integers * scale == values).all()
    assert np.isfinite(scale).all()


@pytest.mark.parametrize(
    ("form", "sha256"),
    [
        ("fp16", "522035bd81b86147d17d5db69b8b695a8cbcb68fdd38e75f67143dd49bb6ca42"),
        ("int8", "40eb5c25f11606de788c2335a3102e1a2bfd51a0f13d63cc7e21f1229c693f23"),
    ],
)
def test_the_same_bytes_with_every_release(form: str, sha256: str) -> None:
    """Manifests list hashes of files that are made again: another recipe is a file that is lost."""
    values = np.random.default_rng(0).normal(size=(48, 48)).astype(np.float32)
    content = backbone_of(
        helper.make_node("MatMul", ["pixels", "w"], ["x"]),
        helper.make_node("Add", ["x", "b"], ["embedding"]),
        w=values,
        b=values[0],
    )
    assert hashlib.sha256(FORMS[form](content)).hexdigest() == sha256


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("content", [b"no file", onnx.ModelProto().SerializeToString()])
def test_of_something_else_there_is_none(content: bytes, form: str) -> None:
    with pytest.raises(DamagedError):
        FORMS[form](content)


def test_agreement_counts_and_measures() -> None:
    sure, unsure = np.array([[1, 0], [1, 0]], np.float32), np.array([[0.5, 0.5], [1, 0]])
    one, other = (np.array([0, 0]), sure), (np.array([1, 0]), unsure.astype(np.float32))
    assert forms.agreement(one, one) == Agreement(2, 0, 0.0)
    assert forms.agreement(one, other) == Agreement(2, 1, 0.25)
    assert forms.agreement(one, other).top1 == 0.5
    broken = (np.array([0, 0]), sure * np.float32(np.nan))
    assert forms.agreement(one, broken).distance == 1


# -- who has them -------------------------------------------------------------------------------


def test_what_is_off_or_disagrees_is_not_handed_out(copy: Store, tmp_path: Path) -> None:
    worker = Worker(copy, Compute(), 1)
    spool = tiny.write_spool(tmp_path / "spool", ["black"], 8)
    limits = Gate(fp16=None, form_distance=0.0)
    number = worker.learn("fifth", spool, CONFIG, 4, Tracker(), limits)
    version = copy.version(number)
    assert version.forms == ()
    assert version.report is not None
    assert not version.candidate
    refusals = [text for text in version.report.warnings if "model.int8.onnx" in text]
    assert len(refusals) == 1
    assert "fp16" not in str(version.report.warnings)


def test_a_form_that_cannot_be_run_fails_no_task(
    copy: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMS, "int8", lambda model: b"what onnxruntime does not take")
    worker = Worker(copy, Compute(), 1)
    spool = tiny.write_spool(tmp_path / "spool", ["black"], 8)
    version = copy.version(worker.learn("fifth", spool, CONFIG, 4, Tracker()))
    assert [form.file.name for form in version.forms] == ["model.fp16.onnx"]
    assert version.report is not None
    assert any("int8.onnx is not handed out: it cannot" in x for x in version.report.warnings)


def test_an_edit_heeds_what_is_switched_off(copy: Store) -> None:
    worker = Worker(copy, Compute(), 1)
    number = worker.edit("edit", Forget(("yellow",)), 4, Tracker(), Gate(int8=None))
    assert [form.file.name for form in copy.version(number).forms] == ["model.fp16.onnx"]


@pytest.mark.parametrize(
    ("agreement", "handed_out"),
    [
        (Agreement(32, 0, 0.0), True),
        (Agreement(32, 2, 0.0), True),  # one time in seven by chance, if 98% agree
        (Agreement(32, 3, 0.0), False),  # one time in forty
        (Agreement(4, 1, 0.0), True),
        (Agreement(1000, 20, 0.0), True),
        (Agreement(1000, 35, 0.0), False),
        (Agreement(32, 0, 0.06), False),
    ],
)
def test_luck_withholds_no_form(agreement: Agreement, handed_out: bool) -> None:
    assert (gate.form_refusal("int8", agreement, Gate()) == "") == handed_out
    lenient = Gate(int8=0.0, form_distance=None)
    assert gate.form_refusal("int8", agreement, lenient) == ""
    assert gate.form_refusal("int8", agreement, Gate(int8=None))


def test_an_edit_has_those_of_the_version_before(copy: Store) -> None:
    number = Worker(copy, Compute(), 1).edit("edit", Forget(("yellow",)), 4, Tracker())
    before, after = copy.version(4).forms, copy.version(number).forms
    assert [x.agreement for x in after] == [x.agreement for x in before]
    for form in FORMS:
        content = updates.file(copy, number, form).content
        assert graph.read_metadata(content).classes == ("red", "green", "blue", "cyan")


def test_a_form_that_cannot_be_made_fails_no_edit(
    copy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: bytes) -> bytes:
        raise ValueError("there are no weights in it")

    monkeypatch.setitem(FORMS, "int8", broken)
    number = Worker(copy, Compute(), 1).edit("edit", Forget(("yellow",)), 4, Tracker())
    assert [form.file.name for form in copy.version(number).forms] == ["model.fp16.onnx"]


def test_with_a_forgotten_class_or_when_retired_it_is_gone(copy: Store) -> None:
    white = [entry.key for entry in copy.version(3).classes if entry.label == "white"]
    copy.forget(white)
    assert copy.forms(copy.version(3)) == ()
    copy.set_current(4)
    copy.retire(2)
    assert copy.forms(copy.version(2)) == ()
    assert len(copy.forms(copy.version(4))) == len(FORMS)
    copy.purge(white)
    assert copy.manifest(3).forms == ()


# -- how they get there -------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_clients_download_it(client: Client, store: Store, tmp_path: Path, form: str) -> None:
    name = forms.file_of(form)
    (listed,) = [x for x in client.version(3).artifacts if x.name == name]
    download = client.download(3, name, to=tmp_path)
    assert download.artifact == replace(listed, agreement=None)
    assert listed.agreement is not None
    assert listed.agreement.top1 == 1
    assert (tmp_path / name).read_bytes() == updates.file(store, 3, form).content


async def test_forms_at_hand_go_with_a_forgotten_class(copy: Store) -> None:
    derived = Derived(copy)
    made = await derived.form(3, "int8")
    assert await derived.form(3, "int8") is made
    copy.forget([entry.key for entry in copy.version(3).classes if entry.label == "white"])
    with pytest.raises(StateError, match="forgotten"):
        await derived.form(3, "int8")
    with pytest.raises(StateError, match="forgotten"):
        await derived.delta(3, "model.int8.delta", [made.entry.sha256])
    assert (await derived.form(4, "int8")).entry == copy.version(4).forms[1].file


async def test_one_is_made_at_a_time_whoever_hangs_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow(model: bytes) -> bytes:
        begun.release()
        assert go_on.wait(60)
        return forms.quantised(model)

    monkeypatch.setitem(FORMS, "int8", slow)
    derived = Derived(store)
    first = asyncio.create_task(derived.form(3, "int8"))
    await asyncio.to_thread(begun.acquire)
    first.cancel()
    second = asyncio.create_task(derived.form(4, "int8"))
    assert not await asyncio.to_thread(begun.acquire, timeout=0.3)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await second).content == updates.file(store, 4, "int8").content


async def test_large_ones_push_out_no_deltas(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived_files, "_KEPT_BYTES", 60_000)
    derived = Derived(store)
    base = store.version(2).files[-1].sha256
    delta = await derived.delta(3, "model.delta", [base])
    large = [await derived.form(number, "fp16") for number in (1, 2, 3)]
    assert len(large[0].content) > 60_000
    assert await derived.delta(3, "model.delta", [base]) is delta
    assert await derived.form(1, "fp16") is large[0], "somebody has it still"


def test_what_there_is_not_is_said(client: Client, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no artifact 'model\.int4\.onnx'"):
        client.download(3, "model.int4.onnx", to=tmp_path)
    with pytest.raises(NotFoundError, match=r"take model\.int8\.onnx"):
        client.download(3, "model.int8.delta", held=["0" * 64], to=tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("base", "target"), [(2, 4), (3, 4), (4, 1)])
def test_deltas_lead_from_form_to_form(
    store: Store, tmp_path: Path, form: str, base: int, target: int
) -> None:
    path, has = tmp_path / "model.onnx", updates.file(store, base, form)
    whole = hashlib.sha256(store.onnx(base)).hexdigest()
    assert updates.bases(store, target, [has.end.sha256, whole], form) == [base]
    assert updates.bases(store, target, [has.end.sha256]) == []
    content = updates.between(store, base, target, form)
    assert content is not None
    path.write_bytes(has.content)
    delta = apply(path, content, path)
    assert isinstance(delta, Delta)
    assert path.read_bytes() == updates.file(store, target, form).content


def test_a_device_follows_a_form(server: RunningServer, client: Client, tmp_path: Path) -> None:
    for form in ("int8", "fp16", "", "int8"):
        # What is there of another form leads nowhere; the whole file does.
        with Device(Server(server.address), tmp_path, form=form) as device:
            for number in (2, 4):
                client.promote(number)
                assert device.update()
                assert not device.update()
                assert device.model.version == number
                assert device.model.form == form


def test_what_came_of_another_form_goes(server: RunningServer, tmp_path: Path) -> None:
    for name in ("incoming.model.onnx.part", "incoming.model.onnx.json", "incoming.others"):
        (tmp_path / name).write_bytes(b"{}")
    with Device(Server(server.address), tmp_path, form="int8"):
        left = [path.name for path in tmp_path.glob("incoming.*")]
    assert left == ["incoming.others"]
    with pytest.raises(ValueError, match="form is 'INT8'"):
        Device(Server(server.address), tmp_path, form="INT8")


def test_a_form_that_is_withheld_leaves_a_device_what_it_has(store: Store, tmp_path: Path) -> None:
    peer = ScriptedServer({"model.int8.onnx": updates.file(store, 2, "int8").content}, 2)
    with (
        peer.running() as address,
        Device(Server(address, timeout=5), tmp_path, form="int8") as device,
    ):
        assert device.update()
        peer.files.clear()
        with pytest.raises(ServerError, match="NOT_FOUND"):
            device.update()
        assert device.model.version == 2
