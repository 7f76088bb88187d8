"""Which versions are let go: laws over generated histories."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from inflora_core.config import Retention
from inflora_core.model import GateCheck, HeldOut, TaskReport, Version, VersionState
from inflora_core.retention import outdated

CANDIDATE = TaskReport(
    *((), 0.9, 1.0, None, None, {}, HeldOut.NONE, 1.0, None, 0, 0, (), {}, {}, "cpu"),
    checks=(GateCheck("leak", 1.0, 0.0, False, ""),),
)
BLANK = Version(0, None, "", "", (), (), datetime(2026, 1, 1, tzinfo=UTC), None)

versions = st.lists(
    st.builds(
        lambda state, pinned, candidate: replace(
            BLANK, state=state, pinned=pinned, report=CANDIDATE if candidate else None
        ),
        st.sampled_from(VersionState),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
).map(lambda found: [replace(version, number=i) for i, version in enumerate(found, 1)])


@given(versions, st.data(), st.integers(0, 5), st.integers(0, 5))
def test_what_is_let_go(
    versions: list[Version], data: st.DataObject, newest: int, onnx_files: int
) -> None:
    wanted = data.draw(st.sets(st.sampled_from([version.number for version in versions])))
    retention = Retention(versions=newest, onnx_files=onnx_files)
    found = outdated(data.draw(st.permutations(versions)), wanted, retention)
    usable = [version for version in versions if not version.state.stripped]
    counted = [version.number for version in usable if not version.candidate]

    assert set(found.versions).isdisjoint(found.onnx_files)
    for version in usable:
        gone = version.number in (*found.versions, *found.onnx_files)
        assert not gone or not (version.pinned or version.number in wanted)
    if not newest:
        assert found.versions == ()
    else:
        assert set(counted[-newest:]).isdisjoint(found.versions)
        free = [n for n in counted if n not in wanted and not versions[n - 1].pinned]
        assert len(set(free) - set(found.versions)) <= newest
    if not onnx_files:
        assert found.onnx_files == ()
    # It is settled: once they are gone, nothing more is.
    after = [v for v in versions if v.number not in found.versions]
    assert outdated(after, wanted, retention).versions == ()
