"""Metrics, alerts, traces and logs of a real server, learning worker and client.

The server runs as its own process and learns a task that the ``inflora`` command uploads, each of
them traced by the standard environment. What is exported is read by parsers of others, and by
``promtool``: that of PATH, of ``PROMTOOL``, or of Debian's package ``prometheus``, which is
unpacked and not installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from inflora_service.metrics import METRICS
from tests.core import tiny
from tests.deploy import expressions
from tests.e2e.conftest import QUICK
from tests.running_server import RunningServer, running_server
from tests.service.collector import Collector, Span, collecting
from tests.service.scraping import Scrape, get

LEARN = "/inflora.v1.LearnerService/LearnTask"
PREDICT = "/inflora.v1.PredictorService/Predict"
STAGES = ("decoding", "designing", "training", "extending", "merging", "exporting", "checking")

CLASSES = {"vermilion": "red", "chartreuse": "green"}
"""What the classes are called, in words that nothing else is, and what they look like."""

SCRAPES = 30


def measure(folder: Path) -> dict[str, Any]:
    """Return the figures; what is not as it should be is listed under ``failed``.

    Args:
        folder: An empty one.
    """
    failed: list[str] = []
    photos = folder / "photos"
    for label, colour in CLASSES.items():
        (photos / label).mkdir(parents=True)
        for number in range(10):
            (photos / label / f"{number}.png").write_bytes(tiny.png(colour, number, 32))
    options = [*QUICK, "--backbone", str(tiny.write_backbone(folder)), "--log-format", "json"]
    with collecting() as collector, environment(collector.environment):
        with running_server(folder / "server", options) as server:
            inflora(server, "learn", str(photos))
            inflora(server, "predict", str(photos / "vermilion" / "0.png"))
            inflora(server, "evaluate", str(photos))
            scrape = Scrape.of(server.http)
            seconds = [scraped(server) for _ in range(SCRAPES)]
        figures = (
            parsed(scrape, folder, failed)
            | looked_up(scrape, failed)
            | traced(collector, failed)
            | logged(server, failed)
        )
    return figures | {"scrape_seconds": round(median(seconds), 4), "failed": failed}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Give variables to the processes that are started."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def inflora(server: RunningServer, *arguments: str) -> None:
    """Run the command as it is traced without a line of code: by ``opentelemetry-instrument``."""
    instrument = "from opentelemetry.instrumentation.auto_instrumentation import run; run()"
    program = "from inflora_client.cli import main; main()"
    command = [sys.executable, "-c", instrument, "--service_name", "shop"]
    command += ["--metrics_exporter", "none", "--logs_exporter", "none"]
    command += [sys.executable, "-c", program]
    subprocess.run(
        [*command, "--server", server.address, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def scraped(server: RunningServer) -> float:
    """Return the seconds of a scrape."""
    began = time.perf_counter()
    get(server.http, "/metrics")
    return time.perf_counter() - began


def parsed(scrape: Scrape, folder: Path, failed: list[str]) -> dict[str, Any]:
    """Have the metrics, the rules and what they find read by others' programs."""
    accuracy = scrape.families["inflora_task_accuracy_ratio"].samples
    if [sample.labels["source"] for sample in accuracy] != ["learned", "evaluated"]:
        failed.append(f"the accuracy of the task is {accuracy}")
    missing = {m.name.removesuffix("_total") for m in METRICS} - scrape.families.keys()
    failed += [f"{name} is not exported" for name in sorted(missing)]
    series = sum(len(family.samples) for family in scrape.families.values())
    figures: dict[str, Any] = {"metrics": len(scrape.families), "series": series}
    tool = promtool(folder)
    figures["promtool"] = tool is not None
    if tool is None:
        print("without promtool, the parsers of prometheus-client and promql-parser have to do")
        return figures
    for what, command, given in (
        ("metrics", ["check", "metrics"], scrape.text),
        ("rules", ["check", "rules", str(expressions.ALERTS)], None),
        ("alerts", ["test", "rules", str(alert_tests(folder))], None),
    ):
        ended = subprocess.run(
            [tool, *command], input=given, capture_output=True, text=True, check=False
        )
        print(ended.stdout + ended.stderr, end="")
        if ended.returncode:
            failed.append(f"promtool has something against the {what}")
    return figures | {"alerts_tested": len(FIRING)}


def looked_up(scrape: Scrape, failed: list[str]) -> dict[str, Any]:
    """Hold the dashboard and the rules against what is exported."""
    exported = scrape.labels
    # Only while a task is being learned, which it is not now.
    exported["inflora_task_progress_ratio"] = set()
    found = [*expressions.expressions()]
    faults = [
        f"{where}: {fault}"
        for where, expression in found
        for fault in expressions.faults(expression, exported)
    ]
    failed += faults
    return {"expressions": len(found), "expressions_wrong": len(faults)}


def traced(collector: Collector, failed: list[str]) -> dict[str, Any]:
    """See that one trace leads from the upload to the worker's stages, and one through Predict."""
    stages = [f"stage {stage}" for stage in STAGES]
    spans = collector.spans(LEARN, PREDICT, "task learn", *stages)
    by_id = {span.id: span for span in spans}

    def line(span: Span) -> list[str]:
        above = line(by_id[span.parent]) if span.parent in by_id else []
        return [*above, f"{span.process} {span.name}"]

    lines = {tuple(line(span)) for span in spans}
    learn = ("shop " + LEARN, "inflora-server " + LEARN, "inflora-worker task learn")
    predict = ("shop " + PREDICT, "inflora-server " + PREDICT)
    for wanted in (predict, *((*learn, f"inflora-worker {stage}") for stage in stages)):
        if wanted not in lines:
            failed.append(f"there is no trace {' > '.join(wanted)}")
    for span in spans:
        if span.process != "shop" and any(label in span.text for label in CLASSES):
            failed.append(f"{span.name} names a class")
    return {"spans": dict(Counter(span.process for span in spans))}


def logged(server: RunningServer, failed: list[str]) -> dict[str, Any]:
    """See that server and worker logged JSON, and tell what calls and tasks lines are about."""
    lines = []
    for text in server.log.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            failed.append(f"a line of the log is not JSON: {text}")
    accepted = [line for line in lines if "accepted: LEARN" in line["message"]]
    if not accepted or not {"request_id", "task", "trace_id"} <= accepted[0].keys():
        failed.append("the log does not say which call brought the task")
    return {"log_lines": len(lines)}


# -- promtool ---------------------------------------------------------------------------------


def promtool(folder: Path) -> str | None:
    """Return the program, None where it cannot be had."""
    found = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if found or not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return found
    place = folder / "prometheus"
    place.mkdir()
    got = subprocess.run(
        ["apt-get", "download", "prometheus"], cwd=place, capture_output=True, check=False
    )
    packages = [*place.glob("*.deb")]
    if got.returncode or not packages:
        return None
    subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(place)], check=True)
    return str(place / "usr" / "bin" / "promtool")


def _calls(code: str, each_minute: int, method: str = "Predict") -> dict[str, str]:
    labels = f'service="inflora.v1.PredictorService", method="{method}", code="{code}"'
    return {f'inflora_rpc_calls_total{{instance="a", {labels}}}': f"0+{each_minute}x120"}


def _buckets(fast: int, slow: int) -> dict[str, str]:
    return {
        f'inflora_rpc_duration_seconds_bucket{{instance="a", method="Predict", le="{bound}"}}': (
            f"0+{fast + (slow if bound != '1.0' else 0)}x120"
        )
        for bound in ("1.0", "2.5", "+Inf")
    }


HEALTHY = {
    'inflora_build_info{instance="a"}': "1x120",
    'inflora_answering{instance="a"}': "1x120",
    'inflora_versions_kept{instance="a"}': "2x120",
    'inflora_stand_in{instance="a"}': "0x120",
    **_calls("OK", 600),
    **_calls("INTERNAL", 1),
    **_calls("RESOURCE_EXHAUSTED", 5),
    **_buckets(600, 1),
    'inflora_predict_waiting_images{instance="a"}': "100x120",
    'inflora_predict_waiting_images_limit{instance="a"}': "1024x120",
    'inflora_follow_lag_seconds{instance="a"}': "60x120",
    'inflora_tasks{instance="a", state="SET_ASIDE"}': "0x120",
    'inflora_tasks{instance="a", state="QUEUED"}': "50x120",
    'inflora_tasks_queued_limit{instance="a"}': "100x120",
    'inflora_tasks_ended_total{instance="a", state="HELD_BACK"}': "3x120",
    'inflora_tasks_ended_total{instance="a", state="FAILED"}': "3x120",
    'inflora_task_progress_ratio{instance="a"}': "0+0.001x120",
    'inflora_worker_up{instance="a"}': "1x120",
    'inflora_worker_restarts_total{instance="a"}': "1x120",
    'inflora_capacity_ratio{instance="a", layers="least"}': "0.4x120",
    'inflora_interference_ratio{instance="a"}': "0.2x120",
    'inflora_leak_ratio{instance="a"}': "0.000003x120",
    'inflora_disk_free_bytes{instance="a"}': "9000000000x120",
    'inflora_disk_needed_bytes{instance="a"}': "1000000000x120",
    'inflora_scrape_faults_total{instance="a"}': "0x120",
}
"""A server with which all is well, minute by minute."""

_LABELLED = {
    "HELD_BACK": 'inflora_tasks_ended_total{instance="a", state="HELD_BACK"}',
    "FAILED": 'inflora_tasks_ended_total{instance="a", state="FAILED"}',
}

FIRING: dict[str, dict[str, str]] = {
    "InfloraAbsent": {'inflora_build_info{instance="a"}': "_x120"},
    "InfloraNoVersionAnswers": {'inflora_answering{instance="a"}': "0x120"},
    "InfloraStandIn": {'inflora_stand_in{instance="a"}': "1x120"},
    "InfloraErrors": _calls("INTERNAL", 50),
    "InfloraPredictSlow": _buckets(600, 50),
    "InfloraPredictRefused": _calls("RESOURCE_EXHAUSTED", 100),
    "InfloraPredictQueueFull": {'inflora_predict_waiting_images{instance="a"}': "1000x120"},
    "InfloraFollowerLate": {'inflora_follow_lag_seconds{instance="a"}': "0+60x120"},
    "InfloraTaskSetAside": {'inflora_tasks{instance="a", state="SET_ASIDE"}': "1x120"},
    "InfloraTaskHeldBack": {_LABELLED["HELD_BACK"]: "3x80 4x40"},
    "InfloraTasksFail": {_LABELLED["FAILED"]: "3x80 6x40"},
    "InfloraTaskQueueFull": {'inflora_tasks{instance="a", state="QUEUED"}': "95x120"},
    "InfloraTaskStuck": {'inflora_task_progress_ratio{instance="a"}': "0.4x120"},
    "InfloraWorkerDown": {'inflora_worker_up{instance="a"}': "0x120"},
    "InfloraWorkerRestarts": {'inflora_worker_restarts_total{instance="a"}': "0+0.2x120"},
    "InfloraCapacityLow": {'inflora_capacity_ratio{instance="a", layers="least"}': "0.05x120"},
    "InfloraInterference": {'inflora_interference_ratio{instance="a"}': "0.8x120"},
    "InfloraDiskLow": {'inflora_disk_free_bytes{instance="a"}': "1500000000x120"},
    "InfloraDiskFull": {'inflora_disk_free_bytes{instance="a"}': "500000000x120"},
    "InfloraScrapeFaults": {'inflora_scrape_faults_total{instance="a"}': "0+1x120"},
}
"""What makes each alert fire, in place of the same series of a healthy server."""

_ALONG = {"InfloraDiskFull": ("InfloraDiskLow",)}
"""Alerts that fire with another."""


def alert_tests(folder: Path) -> Path:
    """Write what promtool is to test of the alerts; return the file."""
    rules = {rule["alert"]: rule for rule in expressions.rules()}
    tests = []
    for name, series in {"": {}, **FIRING}.items():
        values = HEALTHY | series
        firing = {name, *_ALONG.get(name, ())}
        tests.append(
            {
                "name": name or "all is well",
                "interval": "1m",
                "input_series": [{"series": s, "values": v} for s, v in values.items()],
                "promql_expr_test": [
                    {
                        "expr": f'count by (alertname) (ALERTS{{alertname="{rule}", '
                        'alertstate="firing"})',
                        "eval_time": "100m",
                        "exp_samples": [{"labels": f'{{alertname="{rule}"}}', "value": 1}]
                        if rule in firing
                        else [],
                    }
                    for rule in rules
                ],
            }
        )
    path = folder / "alert_tests.yaml"
    content = {"rule_files": [str(expressions.ALERTS)], "evaluation_interval": "1m", "tests": tests}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
