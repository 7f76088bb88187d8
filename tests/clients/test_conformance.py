"""What both clients do, against a peer server that breaks on purpose."""

from __future__ import annotations

import unicodedata
import uuid
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from google.rpc import code_pb2, status_pb2

from inflora.v1 import evaluator_service_pb2 as evaluator_pb
from inflora.v1 import learner_service_pb2, task_pb2
from inflora_client import (
    AlreadyExistsError,
    Calibration,
    CalibrationBin,
    CallCancelledError,
    ClassEvaluation,
    ClassUpdate,
    Client,
    Confusion,
    ConnectionFailedError,
    CorruptDownloadError,
    DataLossError,
    DeadlineExceededError,
    Evaluation,
    Example,
    FailedPreconditionError,
    FieldViolation,
    Forget,
    GateCheck,
    HeldOutMethod,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    NoveltyEvaluation,
    NoveltyShare,
    OutOfRangeError,
    PermissionDeniedError,
    ResourceExhaustedError,
    StatusError,
    TaskEvaluation,
    TaskFailedError,
    TaskHeldBackError,
    TaskKind,
    TaskStage,
    TaskState,
    UnauthenticatedError,
    UnavailableError,
    UnknownLabel,
)
from tests.clients.peer import Peer, status

NAME = "models/default/tasks/t1"


def task(state: str, **fields: object) -> task_pb2.Task:
    return task_pb2.Task(name=NAME, state=f"TASK_STATE_{state}", **fields)


class TestLearn:
    def test_uploads_spec_and_examples(self, client: Client, peer: Peer, tmp_path: Path) -> None:
        file = tmp_path / "a.png"
        file.write_bytes(b"from a file")
        learned = client.learn(
            [Example(b"one", "cat"), (str(file), "dog"), (file, "dog")],
            display_name="pets",
            epochs=3,
            seed=0,
        )
        assert (learned.name, learned.id, learned.state) == (NAME, "t1", TaskState.QUEUED)
        assert [(c.label, c.example_count) for c in learned.classes] == [("cat", 1), ("dog", 2)]
        spec, batch, end = peer.calls["LearnTask"][0]
        assert (spec.spec.display_name, spec.spec.epochs, spec.spec.seed) == ("pets", 3, 0)
        assert end.end.example_count == 3
        assert spec.spec.HasField("seed")
        assert not spec.spec.HasField("rank")
        assert uuid.UUID(spec.spec.request_id).version == 4
        assert [e.image for e in batch.examples.examples] == [b"one"] + [b"from a file"] * 2

    def test_sends_labels_in_nfc(self, client: Client, peer: Peer) -> None:
        decomposed = unicodedata.normalize("NFD", "Käfer")
        learned = client.learn([(b"1", decomposed), (b"2", "Käfer")])
        assert [c.label for c in learned.classes] == ["Käfer"]

    def test_sends_messages_of_half_a_mebibyte(self, client: Client, peer: Peer) -> None:
        client.learn([(bytes(100_000), "a")] * 20 + [(bytes(3_000_000), "b")])
        _, *batches, _ = peer.calls["LearnTask"][0]
        assert [len(b.examples.examples) for b in batches] == [5, 5, 5, 5, 1]

    def test_uploads_a_sequence_again_under_the_same_request_id(
        self, client: Client, peer: Peer
    ) -> None:
        peer.failures["LearnTask"] += [status("UNAVAILABLE")] * 2
        learned = client.learn([(b"1", "a")])
        uploads = peer.calls["LearnTask"]
        assert len(uploads) == 3
        assert {u[0].spec.request_id for u in uploads} == {learned.request_id}
        assert learned.example_count == 1

    def test_gives_up_in_the_end(self, client: Client, peer: Peer) -> None:
        peer.failures["LearnTask"] += [status("UNAVAILABLE")] * 9
        with pytest.raises(UnavailableError):
            client.learn([(b"1", "a")])
        assert len(peer.calls["LearnTask"]) == 3

    def test_does_not_repeat_an_iterator(self, client: Client, peer: Peer) -> None:
        peer.failures["LearnTask"].append(status("UNAVAILABLE"))
        with pytest.raises(UnavailableError):
            client.learn(iter([(b"1", "a")]))
        assert len(peer.calls["LearnTask"]) == 1

    def test_goes_on_where_it_broke_off(self, client: Client, peer: Peer) -> None:
        images = [bytes([number]) * 300_000 for number in range(8)]
        peer.upload_breaks += [3, 0, 2]
        learned = client.learn([(image, "a") for image in images], epochs=3)
        assert learned.example_count == 8
        uploads = peer.calls["LearnTask"]
        assert [u[0].spec.resume_from for u in uploads] == [0, 3, 3, 5]
        sent = [[e.image[0] for m in u[1:] for e in m.examples.examples] for u in uploads]
        assert sent == [[0, 1, 2], [], [3, 4], [5, 6, 7]]
        assert uploads[-1][-1].end.example_count == 8
        for upload in uploads:
            upload[0].spec.resume_from = 0
            assert upload[0] == uploads[0][0], "the spec is the same otherwise"

    def test_does_not_read_again_what_has_arrived(
        self, client: Client, peer: Peer, tmp_path: Path
    ) -> None:
        class Folder:
            """No sequence, and no iterator."""

            def __iter__(self) -> Iterator[tuple[Path, str]]:
                for number in range(6):
                    yield tmp_path / str(number), "a"

        for number in range(6):
            (tmp_path / str(number)).write_bytes(bytes([number]) * 600_000)
        peer.upload_breaks.append(3)

        def remove_what_arrived() -> None:
            for number in range(3):
                (tmp_path / str(number)).unlink()

        peer.on_query = remove_what_arrived
        assert client.learn(Folder()).example_count == 6

    def test_goes_on_after_being_out_of_step(self, client: Client, peer: Peer) -> None:
        peer.upload_breaks.append(3)
        peer.stale_counts.append(2)
        assert client.learn([(bytes(600_000), "a")] * 5).example_count == 5
        uploads = peer.calls["LearnTask"]
        assert [u[0].spec.resume_from for u in uploads] == [0, 2, 3]

    def test_gives_up_an_upload_that_gets_no_further(self, client: Client, peer: Peer) -> None:
        peer.upload_breaks += [0] * 9
        with pytest.raises(UnavailableError):
            client.learn([(bytes(600_000), "a")] * 5)
        assert len(peer.calls["LearnTask"]) == 3

    def test_begins_anew_where_nothing_was_kept(self, client: Client, peer: Peer) -> None:
        peer.upload_breaks.append(2)
        peer.on_query = peer.uploads.clear
        assert client.learn([(bytes(600_000), "a")] * 4).example_count == 4
        assert [u[0].spec.resume_from for u in peer.calls["LearnTask"]] == [0, 0]

    def test_goes_on_with_a_server_that_knows_no_query(self, client: Client, peer: Peer) -> None:
        peer.upload_breaks.append(2)
        peer.failures["QueryUpload"].append(status("UNIMPLEMENTED"))
        assert client.learn([(bytes(600_000), "a")] * 4).example_count == 4
        assert [u[0].spec.resume_from for u in peer.calls["LearnTask"]] == [0, 0]

    @pytest.mark.parametrize("once", [False, True])
    def test_finds_the_task_whose_answer_was_lost(
        self, client: Client, peer: Peer, once: bool
    ) -> None:
        peer.lost_answers.append(status("UNAVAILABLE"))
        examples = [(b"1", "a"), (b"2", "b")]
        learned = client.learn(iter(examples) if once else examples)
        assert (learned.name, learned.example_count) == (NAME, 2)
        assert len(peer.calls["LearnTask"]) == 1

    def test_has_the_server_compare_under_an_id_of_the_caller(
        self, client: Client, peer: Peer
    ) -> None:
        """The task may be another, of an earlier use of the id."""
        peer.lost_answers.append(status("UNAVAILABLE"))
        client.learn([(b"1", "a"), (b"2", "b")], request_id="mine")
        assert [u[0].spec.resume_from for u in peer.calls["LearnTask"]] == [0, 0]

    def test_keeps_nothing_after_an_error_on_this_side(
        self, client: Client, peer: Peer, tmp_path: Path
    ) -> None:
        with pytest.raises(FileNotFoundError):
            client.learn([(bytes(600_000), "a"), (b"", "a"), (tmp_path / "gone.png", "a")])
        assert peer.upload_ended.wait(10)
        assert not peer.tasks

    def test_reports_a_refusal_that_comes_before_the_end(self, client: Client, peer: Peer) -> None:
        peer.failures["LearnTask"].append(status("RESOURCE_EXHAUSTED", "too large"))
        with pytest.raises(ResourceExhaustedError, match="too large"):
            client.learn([(bytes(500_000), "a")] * 40)


class TestTasks:
    def test_watch_goes_on_after_a_break(self, client: Client, peer: Peer) -> None:
        learning = task("LEARNING", stage="TASK_STAGE_TRAINING", epoch=1, epochs=2, loss=0.5)
        peer.watches += [
            [task("QUEUED"), learning, status("UNAVAILABLE")],
            [dropped()],
            [learning],
            [learning, task("PUBLISHED", version="models/default/versions/1")],
        ]
        seen = list(client.watch("t1"))
        assert [t.state for t in seen] == ["QUEUED", "LEARNING", "PUBLISHED"]
        assert (seen[1].stage, seen[1].epoch, seen[1].loss) == (TaskStage.TRAINING, 1, 0.5)
        assert {call.name for call in peer.calls["WatchTask"]} == {NAME}
        assert len(peer.calls["WatchTask"]) == 4

    def test_watch_gives_up_in_the_end(self, client: Client, peer: Peer) -> None:
        peer.failures["WatchTask"] += [status("UNAVAILABLE")] * 9
        with pytest.raises(UnavailableError):
            list(client.watch(NAME))
        assert len(peer.calls["WatchTask"]) == 3

    def test_watch_does_not_retry_what_a_retry_does_not_help(
        self, client: Client, peer: Peer
    ) -> None:
        peer.failures["WatchTask"].append(status("NOT_FOUND"))
        with pytest.raises(NotFoundError):
            list(client.watch("t1"))
        assert len(peer.calls["WatchTask"]) == 1

    def test_watch_can_be_left(self, client: Client, peer: Peer) -> None:
        peer.add_task("t1", state="TASK_STATE_LEARNING")
        watch = client.watch("t1")
        assert next(watch).state == TaskState.LEARNING
        watch.close()

    def test_wait_returns_the_report(self, client: Client, peer: Peer) -> None:
        report = task_pb2.TaskReport(
            leak=1e-6,
            layers=[task_pb2.LayerReport(layer="blocks.0.attn", dimension=192, rank=10)],
            held_out_accuracy=0.5,
            parity=task_pb2.ParityReport(images=4, max_abs_diff=1e-5),
            stage_seconds=[task_pb2.StageSeconds(stage="TASK_STAGE_MERGING", seconds=0.25)],
            settings=task_pb2.LearningSettings(epochs=2, preset="default"),
            epoch_losses=[1.0, 0.5],
            warnings=["little is free"],
            held_out_method="HELD_OUT_METHOD_LEAVE_ONE_OUT",
            temperature=4.5,
            class_bytes=2320,
            shared_bytes=294912,
            kept_epoch=1,
        )
        peer.watches.append([task("PUBLISHED", report=report)])
        published = client.wait(client.learn([(b"1", "a")]))
        assert published.report is not None
        assert published.report.layers[0].dimension == 192
        assert published.report.held_out_accuracy == 0.5
        assert published.report.held_out_accuracy_task_known is None
        assert published.report.parity is not None
        assert published.report.parity.images == 4
        assert published.report.stage_seconds[0].stage == TaskStage.MERGING
        assert published.report.settings.preset == "default"
        assert published.report.epoch_losses == (1.0, 0.5)
        assert published.report.warnings == ("little is free",)
        assert published.report.held_out_method == HeldOutMethod.LEAVE_ONE_OUT
        assert published.report.temperature == 4.5
        assert published.report.tasks_left is None
        assert (published.report.class_bytes, published.report.shared_bytes) == (2320, 294912)
        assert published.report.kept_epoch == 1

    def test_wait_raises_for_a_failed_task(self, client: Client, peer: Peer) -> None:
        why = status("RESOURCE_EXHAUSTED", "out of memory", "OUT_OF_MEMORY")
        peer.watches.append([task("FAILED", error=why)])
        with pytest.raises(TaskFailedError, match="t1 ended as FAILED: out of memory") as caught:
            client.wait("t1")
        assert caught.value.task.error is not None
        assert caught.value.task.error.code == "RESOURCE_EXHAUSTED"
        assert caught.value.task.error.reason == "OUT_OF_MEMORY"

    def test_wait_raises_for_a_cancelled_task(self, client: Client, peer: Peer) -> None:
        peer.watches.append([task("CANCELLED")])
        with pytest.raises(TaskFailedError, match="CANCELLED"):
            client.wait("t1")

    def test_wait_raises_for_a_task_that_is_held_back(self, client: Client, peer: Peer) -> None:
        leak = task_pb2.GateCheck(name="leak", value=0.0, limit=0.01, passed=True)
        canary = task_pb2.GateCheck(name="canary", limit=0.1, passed=True)
        failed = task_pb2.GateCheck(name="accuracy", value=0.02, limit=0.1, message="Are they?")
        report = task_pb2.TaskReport(checks=[leak, canary, failed], untrained_accuracy=0.125)
        why = status("FAILED_PRECONDITION", "version 4 is held back: Are they?", "GATE")
        version = "models/default/versions/4"
        held_back = task("HELD_BACK", error=why, report=report, version=version)
        peer.watches.append([task("QUEUED"), held_back])
        with pytest.raises(TaskHeldBackError, match="t1 ended as HELD_BACK: version 4 is") as found:
            client.wait("t1")
        assert found.value.task.state == TaskState.HELD_BACK
        assert found.value.task.ended
        assert found.value.task.version == version
        assert found.value.task.error is not None
        assert found.value.task.error.reason == "GATE"
        assert found.value.report is not None
        assert found.value.report.untrained_accuracy == 0.125
        assert [check.value for check in found.value.report.checks] == [0.0, None, 0.02]
        assert found.value.report.failed_checks == (
            GateCheck("accuracy", 0.02, 0.1, passed=False, message="Are they?"),
        )

    def test_lists_all_pages(self, client: Client, peer: Peer) -> None:
        for number in range(5):
            peer.add_task(f"t{number}")
        assert [t.id for t in client.tasks()] == ["t4", "t3", "t2", "t1", "t0"]
        assert [call.page_token for call in peer.calls["ListTasks"]] == ["", "2", "4"]
        assert {call.parent for call in peer.calls["ListTasks"]} == {"models/default"}

    def test_lists_nothing(self, client: Client) -> None:
        assert list(client.tasks()) == []

    def test_gets_and_cancels(self, client: Client, peer: Peer) -> None:
        peer.add_task("t1", state="TASK_STATE_QUEUED").create_time.FromSeconds(0)
        found = client.task("t1")
        assert found.create_time == datetime(1970, 1, 1, tzinfo=UTC)
        assert found.start_time is None
        cancelled = client.cancel(found)
        assert cancelled.state == TaskState.CANCELLED
        assert cancelled.ended

    def test_retries(self, client: Client, peer: Peer) -> None:
        peer.add_task("t1", state="TASK_STATE_SET_ASIDE")
        assert client.task("t1").ended
        assert client.retry("t1").state == TaskState.QUEUED

    def test_does_not_stumble_over_a_newer_servers_states(self, client: Client, peer: Peer) -> None:
        peer.add_task("t1", state=77, stage=88, kind=99)
        found = client.task("t1")
        assert (found.state, found.stage) == (TaskState.UNSPECIFIED, TaskStage.UNSPECIFIED)
        assert found.kind == TaskKind.UNSPECIFIED

    def test_forgets(self, client: Client, peer: Peer) -> None:
        peer.failures["ForgetClasses"].append(status("UNAVAILABLE"))
        task = client.forget(["Cafe\u0301", "dog"], purge=True, request_id="r")
        assert (task.kind, task.forget) == (TaskKind.FORGET, Forget(("Café", "dog"), purge=True))
        assert task.update is None
        assert client.task(task) == task
        first, second = peer.calls["ForgetClasses"]
        assert (
            first
            == second
            == learner_service_pb2.ForgetClassesRequest(
                parent="models/default", labels=["Café", "dog"], purge=True, request_id="r"
            )
        )
        assert client.forget("dog").forget == Forget(("dog",), purge=False), "not its letters"

    def test_updates_a_class(self, client: Client, peer: Peer) -> None:
        peer.failures["UpdateClass"].append(status("UNAVAILABLE"))
        task = client.update_class("cat", new_label="Cafe\u0301", add_aliases=["a", "b"])
        assert task.kind == TaskKind.UPDATE_CLASS
        assert task.update == ClassUpdate("cat", "Café", ("a", "b"), ())
        assert task.forget is None
        first, second = peer.calls["UpdateClass"]
        assert first == second, "a retry is the same request"
        assert first.request_id
        task = client.update_class("cat", add_aliases="kitty", remove_aliases="puss")
        assert task.update == ClassUpdate("cat", None, ("kitty",), ("puss",))
        assert peer.calls["UpdateClass"][-1].request_id != first.request_id

    def test_refuses_an_empty_name(self, client: Client) -> None:
        with pytest.raises(ValueError, match="empty name"):
            client.task("")


class TestPredict:
    def test_classifies_bytes_and_files(self, client: Client, peer: Peer, tmp_path: Path) -> None:
        file = tmp_path / "a.png"
        file.write_bytes(b"dog")
        result = client.predict([b"cat", file], top_k=1, version=3, task="t1")
        assert result.version == "models/default/versions/3"
        assert [(p.label, p.probability, p.novelty) for p in result.predictions] == [
            ("cat", 0.75, 0.25),
            ("dog", 0.75, 0.25),
        ]
        (request,) = peer.calls["Predict"]
        assert (request.model, request.task, request.top_k) == ("models/default", NAME, 1)

    def test_asks_for_the_current_version_by_default(self, client: Client, peer: Peer) -> None:
        peer.add_version()
        assert client.predict([b"cat"]).version == "models/default/versions/1"
        assert peer.calls["Predict"][0].version == ""
        assert peer.calls["Predict"][0].task == ""

    def test_embeddings_are_there_if_asked_for(self, client: Client) -> None:
        for wanted in (False, True):
            expected = (0.5, -1.0) if wanted else ()
            answers = [
                client.predict([b"a"], return_embedding=wanted),
                *client.predict_stream([[b"a"]], return_embedding=wanted),
            ]
            assert [answer.predictions[0].embedding for answer in answers] == [expected] * 2

    def test_takes_what_can_be_read(self, client: Client, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            archive.writestr("cat.png", b"cat")
        with zipfile.ZipFile(tmp_path / "images.zip") as archive:
            image = zipfile.Path(archive, "cat.png")
            assert client.predict([image]).predictions[0].label == "cat"
            client.learn([(image, "cat")])
        (_, batch, _) = peer.calls["LearnTask"][0]
        assert batch.examples.examples[0].image == b"cat"

    def test_is_retried_however_large_the_images(self, client: Client, peer: Peer) -> None:
        peer.failures["Predict"] += [status("UNAVAILABLE")] * 2
        assert len(client.predict([b"x" * 3_000_000]).predictions) == 1
        assert len(peer.calls["Predict"]) == 3

    def test_streams(self, client: Client, peer: Peer) -> None:
        results = list(client.predict_stream([[b"a"], [b"b", b"c"]], top_k=1, version="2"))
        assert [[p.label for p in r.predictions] for r in results] == [["a"], ["b", "c"]]
        assert {r.version for r in results} == {"models/default/versions/2"}

    def test_stream_ends_with_the_servers_error(self, client: Client, peer: Peer) -> None:
        peer.failures["PredictStream"].append(status("INVALID_ARGUMENT"))
        with pytest.raises(InvalidArgumentError):
            list(client.predict_stream([[b"a"]]))

    def test_stream_raises_an_error_of_the_requests(self, client: Client) -> None:
        def requests() -> Iterator[list[bytes]]:
            yield [b"a"]
            raise KeyError("camera")

        results = client.predict_stream(requests())
        assert next(results).predictions[0].label == "a"
        with pytest.raises(KeyError, match="camera"):
            next(results)


class TestEvaluate:
    def test_uploads_spec_and_examples(self, client: Client, peer: Peer, tmp_path: Path) -> None:
        file = tmp_path / "a.png"
        file.write_bytes(b"from a file")
        decomposed = unicodedata.normalize("NFD", "Käfer")
        found = client.evaluate(
            [Example(b"one", "cat"), (file, decomposed)], version=3, confusions=7
        )
        assert (found.version, found.images) == ("models/default/versions/3", 2)
        spec, batch, end = peer.calls["Evaluate"][0]
        assert spec.spec == evaluator_pb.EvaluationSpec(
            model="models/default", version="models/default/versions/3", confusions=7
        )
        sent = [(e.image, e.label) for e in batch.examples.examples]
        assert sent == [(b"one", "cat"), (b"from a file", "Käfer")]
        assert end.end.example_count == 2

    def test_measures_the_current_version_by_default(self, client: Client, peer: Peer) -> None:
        peer.add_version()
        found = client.evaluate([(bytes(300_000), "a")] * 4)
        assert (found.version, found.images) == ("models/default/versions/1", 4)
        spec, *batches, _ = peer.calls["Evaluate"][0]
        assert (spec.spec.version, spec.spec.confusions) == ("", 20)
        assert [len(b.examples.examples) for b in batches] == [1] * 4

    def test_returns_every_figure(self, client: Client, peer: Peer) -> None:
        peer.evaluation = evaluator_pb.Evaluation(
            unknown_images=2,
            accuracy=0.5,
            accuracy_task_known=0.75,
            mean_class_accuracy=0.25,
            classes=[
                evaluator_pb.ClassEvaluation(
                    label="cat",
                    task=NAME,
                    images=4,
                    accuracy=0.5,
                    mean_probability=0.4,
                    confused_with="dog",
                    confused_images=2,
                )
            ],
            tasks=[
                evaluator_pb.TaskEvaluation(
                    task=NAME, images=4, accuracy=0.5, accuracy_task_known=0.75
                )
            ],
            confusions=[evaluator_pb.Confusion(truth="cat", answer="dog", images=2, share=0.5)],
            calibration=evaluator_pb.Calibration(
                expected_error=0.1,
                bins=[
                    evaluator_pb.CalibrationBin(
                        lower=0.0, upper=0.5, images=4, mean_confidence=0.3, accuracy=0.2
                    )
                ],
                negative_log_likelihood=1.5,
                brier=0.6,
            ),
            novelty=evaluator_pb.NoveltyEvaluation(
                auroc=0.9,
                shares=[
                    evaluator_pb.NoveltyShare(threshold=0.5, known=0.0, unknown=1.0),
                    evaluator_pb.NoveltyShare(threshold=0.9),
                ],
            ),
            unknown_labels=[evaluator_pb.UnknownLabel(label="cow", images=2)],
        )
        assert client.evaluate([(b"1", "cat")], "models/default/versions/1") == Evaluation(
            version="models/default/versions/1",
            images=1,
            unknown_images=2,
            accuracy=0.5,
            accuracy_task_known=0.75,
            mean_class_accuracy=0.25,
            classes=(ClassEvaluation("cat", NAME, 4, 0.5, 0.4, "dog", 2),),
            tasks=(TaskEvaluation(NAME, 4, 0.5, 0.75),),
            confusions=(Confusion("cat", "dog", 2, 0.5),),
            calibration=Calibration(0.1, (CalibrationBin(0.0, 0.5, 4, 0.3, 0.2),), 1.5, 0.6),
            novelty=NoveltyEvaluation(
                0.9, (NoveltyShare(0.5, 0.0, 1.0), NoveltyShare(0.9, None, None))
            ),
            unknown_labels=(UnknownLabel("cow", 2),),
        )

    def test_tells_what_was_not_measured(self, client: Client) -> None:
        found = client.evaluate([(b"1", "cat")], 1)
        assert found.accuracy is found.accuracy_task_known is found.mean_class_accuracy is None
        assert found.calibration is None
        assert found.novelty == NoveltyEvaluation(None, ())

    def test_uploads_a_sequence_again(self, client: Client, peer: Peer) -> None:
        peer.failures["Evaluate"] += [status("UNAVAILABLE")] * 2
        assert client.evaluate([(b"1", "a")]).images == 1
        assert len(peer.calls["Evaluate"]) == 3

    def test_does_not_repeat_an_iterator(self, client: Client, peer: Peer) -> None:
        peer.failures["Evaluate"].append(status("UNAVAILABLE"))
        with pytest.raises(UnavailableError):
            client.evaluate(iter([(b"1", "a")]))
        assert len(peer.calls["Evaluate"]) == 1

    def test_raises_an_error_on_this_side(self, client: Client, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            client.evaluate([(b"1", "a"), (tmp_path / "gone.png", "a")])

    def test_reports_a_refusal_that_comes_before_the_end(self, client: Client, peer: Peer) -> None:
        peer.failures["Evaluate"].append(status("NOT_FOUND", "no such version"))
        with pytest.raises(NotFoundError, match="no such version"):
            client.evaluate([(bytes(500_000), "a")] * 40, version=9)


class TestVersions:
    def test_lists_gets_and_promotes(self, client: Client, peer: Peer) -> None:
        for _ in range(3):
            peer.add_version()
        assert [v.number for v in client.versions()] == [3, 2, 1]
        assert client.version().number == 3
        promoted = client.promote(1)
        assert promoted.current
        assert promoted.parent == ""
        assert promoted.classes[0].label == "cat"
        assert promoted.create_time == datetime.fromtimestamp(1_800_000_001, UTC)
        assert client.version("current").number == 1
        assert client.version(promoted) == promoted
        assert client.version("models/default/versions/2").number == 2

    def test_forces_a_candidate(self, client: Client, peer: Peer) -> None:
        peer.add_version()
        check = task_pb2.GateCheck(name="leak", value=0.5, limit=0.01, message="It leaks.")
        candidate = peer.add_version()
        candidate.candidate = True
        candidate.failed_checks.append(check)
        assert not client.promote(1).candidate
        forced = client.promote(2, force=True)
        assert (forced.candidate, forced.current) == (True, True)
        assert forced.failed_checks == (GateCheck("leak", 0.5, 0.01, False, "It leaks."),)
        assert [call.force for call in peer.calls["PromoteVersion"]] == [False, True]

    def test_unknown_version(self, client: Client) -> None:
        with pytest.raises(NotFoundError, match="versions/7"):
            client.promote("7")


class TestDownload:
    def test_writes_a_verified_file(self, client: Client, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        got = client.download(to=tmp_path)
        assert got.path == tmp_path / "model.onnx"
        assert got.path.read_bytes() == peer.content
        assert got.version == "models/default/versions/1"
        assert got.artifact.size == len(peer.content)
        assert list(tmp_path.iterdir()) == [got.path]

    def test_goes_on_at_the_offset_in_the_same_version(
        self, client: Client, peer: Peer, tmp_path: Path
    ) -> None:
        peer.add_version()
        peer.add_version()
        peer.breaks += [30, 0, 500]
        got = client.download("current", to=tmp_path / "m.onnx")
        assert got.path.read_bytes() == peer.content
        requests = peer.calls["DownloadArtifact"]
        assert [r.offset for r in requests] == [0, 30, 30, 530]
        assert [r.name.rpartition("/")[2] for r in requests] == ["current", "2", "2", "2"]

    def test_replaces_an_older_file(self, client: Client, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        (tmp_path / "m.onnx").write_bytes(b"old")
        client.download(1, to=tmp_path / "m.onnx")
        assert (tmp_path / "m.onnx").read_bytes() == peer.content

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ({"sha256": "0" * 64}, "announced 1024 and 0000"),
            ({"announced_size": 1000}, "announced 1000"),
            ({"skip": 1}, "should have come next"),
        ],
    )
    def test_keeps_nothing_of_a_corrupt_file(
        self,
        client: Client,
        peer: Peer,
        tmp_path: Path,
        fault: dict[str, object],
        message: str,
    ) -> None:
        vars(peer).update(fault)
        peer.add_version()
        (tmp_path / "m.onnx").write_bytes(b"old")
        with pytest.raises(CorruptDownloadError, match=message):
            client.download(1, to=tmp_path / "m.onnx")
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]

    def test_keeps_nothing_after_an_error(self, client: Client, peer: Peer, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError):
            client.download(1, to=tmp_path)
        assert not list(tmp_path.iterdir())

    def test_gives_up_in_the_end(self, client: Client, peer: Peer, tmp_path: Path) -> None:
        peer.add_version()
        peer.announced_size = len(peer.content) + 1
        peer.content = b""
        with pytest.raises(UnavailableError, match="early"):
            client.download(1, to=tmp_path)


def dropped() -> status_pb2.Status:
    """What gRPC says of a call that a server has received, and not begun with, when it stops."""
    return status_pb2.Status(code=code_pb2.CANCELLED, message="CANCELLED")


class TestErrors:
    @pytest.mark.parametrize(
        ("code", "kind"),
        [
            ("INVALID_ARGUMENT", InvalidArgumentError),
            ("NOT_FOUND", NotFoundError),
            ("ALREADY_EXISTS", AlreadyExistsError),
            ("FAILED_PRECONDITION", FailedPreconditionError),
            ("RESOURCE_EXHAUSTED", ResourceExhaustedError),
            ("DEADLINE_EXCEEDED", DeadlineExceededError),
            ("CANCELLED", CallCancelledError),
            ("DATA_LOSS", DataLossError),
            ("OUT_OF_RANGE", OutOfRangeError),
            ("INTERNAL", InternalError),
            ("UNAUTHENTICATED", UnauthenticatedError),
            ("PERMISSION_DENIED", PermissionDeniedError),
            ("ABORTED", StatusError),
        ],
    )
    def test_each_status_has_its_class(
        self, client: Client, peer: Peer, code: str, kind: type[StatusError]
    ) -> None:
        # As often as any of them is tried.
        failure = status(code, "no", "WHY", {"images[3]": "is empty", "top_k": "is negative"})
        peer.failures["GetTask"] += [failure] * 3
        with pytest.raises(StatusError) as caught:
            client.task("t1")
        error = caught.value
        assert type(error) is kind
        assert (error.code, error.message, error.reason) == (code, "no", "WHY")
        assert error.field_violations == (
            FieldViolation("images[3]", "is empty"),
            FieldViolation("top_k", "is negative"),
        )
        assert str(error) == "no (images[3]: is empty; top_k: is negative)"

    def test_a_message_is_not_said_twice(self, client: Client, peer: Peer) -> None:
        peer.failures["GetTask"].append(status("INVALID_ARGUMENT", "no", fields={"name": "no"}))
        with pytest.raises(InvalidArgumentError) as caught:
            client.task("t1")
        assert str(caught.value) == "no (name)"

    def test_a_status_without_details(self, client: Client, peer: Peer) -> None:
        bare = status("INVALID_ARGUMENT", "no")
        bare.ClearField("details")
        peer.failures["GetTask"].append(bare)
        with pytest.raises(InvalidArgumentError, match="no") as caught:
            client.task("t1")
        assert caught.value.reason == ""

    def test_unary_calls_are_retried_until_a_limit(self, client: Client, peer: Peer) -> None:
        peer.add_task("t1")
        peer.failures["GetTask"] += [status("UNAVAILABLE")] * 5
        with pytest.raises(UnavailableError) as caught:
            client.task("t1")
        assert type(caught.value) is UnavailableError
        assert len(peer.calls["GetTask"]) == 3
        assert client.task("t1").id == "t1"

    def test_calls_that_a_server_drops_when_it_stops_are_retried(
        self, client: Client, peer: Peer
    ) -> None:
        peer.add_task("t1")
        peer.failures["GetTask"] += [dropped()] * 2
        assert client.task("t1").id == "t1"
        peer.failures["GetTask"] += [dropped()] * 3
        with pytest.raises(ConnectionFailedError):
            client.task("t1")

    def test_nobody_listens(self, peer: Peer, connect: Callable[..., Client]) -> None:
        peer.stop()
        client = connect(peer.address)
        with pytest.raises(ConnectionFailedError):
            client.task("t1")
        with pytest.raises(ConnectionFailedError):
            client.learn([(b"1", "a")])
        with pytest.raises(ConnectionFailedError):
            client.wait("t1")

    def test_the_answer_takes_too_long(self, peer: Peer, connect: Callable[..., Client]) -> None:
        with pytest.raises(DeadlineExceededError):
            connect(peer.address, timeout=0.05).predict([b"a"], version=99)

    def test_another_model(self, peer: Peer, connect: Callable[..., Client]) -> None:
        client = connect(peer.address, model="birds")
        with pytest.raises(NotFoundError, match="models/birds/tasks/t1"):
            client.task("t1")
