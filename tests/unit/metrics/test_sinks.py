"""Sinks against the real libraries: what was written is read back as a user's tools would read it."""

import json
import logging
import stat
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.metrics import MetricsConfig, WandbConfig
from megatron_fipo.metrics.sinks.base import require_library
from megatron_fipo.metrics.sinks.prometheus import PrometheusSink
from megatron_fipo.metrics.writer import MetricsWriter, check_sinks, open_sinks
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.run_dir import RunDirectory

STEPS = [
    {"step": 1, "train/loss": 0.5, "train/loss_by_update": [0.25, 0.75], "train/entropy": float("nan")},
    {"step": 2, "train/loss": -0.25, "rollout/math/accuracy": 0.75, "rollout/logic/accuracy": 0.5},
]


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", "")


def write_steps(directory: RunDirectory, config: MetricsConfig) -> None:
    check_sinks(config)
    writer = MetricsWriter(directory, open_sinks(config, directory.path, {"seed": 7, "model": {"path": "m"}}))
    for metrics in STEPS:
        writer.write(metrics)
    writer.close()


def test_metrics_jsonl_is_written_without_any_sink(directory: RunDirectory) -> None:
    write_steps(directory, MetricsConfig())
    lines = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{**STEPS[0], "train/entropy": None}, STEPS[1]]
    assert sorted(path.name for path in directory.path.iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_tensorboard_reads_the_curves(directory: RunDirectory) -> None:
    write_steps(directory, MetricsConfig(tensorboard=True))
    events = EventAccumulator(str(directory.path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "rollout/math/accuracy", "rollout/logic/accuracy"}
    assert [(point.step, point.value) for point in events.Scalars("train/loss")] == [(1, 0.5), (2, -0.25)]


def test_wandb_keeps_an_offline_run(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    # The run alone says where its files lie and whether it may go online.
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    write_steps(directory, MetricsConfig(wandb=WandbConfig(mode="offline", project="fipo", run_name="first")))
    (file,) = (directory.path / "wandb").glob("offline-run-*/*.wandb")
    runs, history = [], []
    for record in wandb_records(file):
        if record.HasField("run"):
            runs.append(record.run)
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append(
                {key: value for key, value in items.items() if not key.startswith("_")} | {"step": items.get("_step")}
            )
    assert (runs[0].project, runs[0].display_name) == ("fipo", "first")
    settings = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert (settings["seed"], settings["model"]) == (7, {"path": "m"})
    assert history == [
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "train/loss": -0.25, "rollout/math/accuracy": 0.75, "rollout/logic/accuracy": 0.5},
    ]


def wandb_records(file: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Records of a .wandb file: after 7 bytes, LevelDB's log format in blocks of 32 KiB."""
    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.fixture
def prometheus(directory: RunDirectory) -> Iterator[PrometheusSink]:
    (sink,) = open_sinks(MetricsConfig(prometheus_port=0), directory.path, {})
    assert isinstance(sink, PrometheusSink)
    yield sink
    sink.close()


def scrape(url: str, authorization: str | None) -> str:
    headers = {} if authorization is None else {"Authorization": authorization}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as response:
        text: str = response.read().decode()
    return text


def test_prometheus_scrapes_the_latest_values(directory: RunDirectory, prometheus: PrometheusSink) -> None:
    writer = MetricsWriter(directory, [prometheus])
    for metrics in STEPS:
        writer.write(metrics)
    url = (directory.path / "prometheus_address").read_text().strip()
    token_file = directory.path / "prometheus_token"
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    assert url.startswith("http://127.0.0.1:")
    text = scrape(url, f"Bearer {token_file.read_text()}")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {name: [(s.labels, s.value) for s in family.samples] for name, family in families.items()}
    assert values == {
        "megatron_fipo_step": [({}, 2.0)],
        "megatron_fipo_train_loss": [({}, -0.25)],
        "megatron_fipo_rollout_source_accuracy": [({"source": "logic"}, 0.5), ({"source": "math"}, 0.75)],
    }
    assert families["megatron_fipo_train_loss"].documentation.startswith("Σ numerators / D")


def test_prometheus_gives_nothing_without_the_token(prometheus: PrometheusSink) -> None:
    prometheus.write(1, {"train/loss": 0.5})
    for authorization in (None, "Bearer wrong", "Bearer ", "Basic dXNlcjpwdw==", "Bearer t\xf6ken"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            scrape(prometheus.url, authorization)
        assert caught.value.code == 401
        assert b"megatron_fipo" not in caught.value.read()


def test_prometheus_makes_a_new_token_and_stops_listening(directory: RunDirectory) -> None:
    token_file = directory.path / "prometheus_token"
    token_file.write_text("known to others")
    token_file.chmod(0o644)
    sink = PrometheusSink(0, directory.path)
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    with pytest.raises(urllib.error.HTTPError):
        scrape(sink.url, "Bearer known to others")
    sink.close()
    with pytest.raises(urllib.error.URLError):
        scrape(sink.url, None)


def test_a_taken_port_is_named(prometheus: PrometheusSink, tmp_path: Path) -> None:
    other = RunDirectory.create(tmp_path / "other", "")
    port = int(prometheus.url.split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match=rf"metrics.prometheus_port = {port}: must be a free port"):
        open_sinks(MetricsConfig(prometheus_port=port), other.path, {})
    with pytest.raises(ConfigError, match=rf"metrics.prometheus_port = {port}: must be a free port"):
        check_sinks(MetricsConfig(prometheus_port=port))


def test_a_sink_that_cannot_open_closes_those_before_it(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Online without a login, whatever the machine's own login is."""
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    config = MetricsConfig(prometheus_port=0, wandb=WandbConfig(mode="online"))
    with pytest.raises(ConfigError, match='metrics.wandb.mode = online: W&B could not start a run .*"offline"'):
        open_sinks(config, directory.path, {})
    with pytest.raises(urllib.error.URLError, match="refused"):
        scrape((directory.path / "prometheus_address").read_text().strip(), None)


class BrokenSink:
    """Fails at the second step, and at closing."""

    name = "Broken"

    def __init__(self) -> None:
        self.written: list[int] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step in (2, 3):
            raise OSError("no space left on device")
        self.written.append(step)

    def close(self) -> None:
        raise OSError("no space left on device")


def test_a_failing_sink_warns_once_and_stops_nothing(directory: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    sink = BrokenSink()
    writer = MetricsWriter(directory, [sink])
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3, 4):
            writer.write({"step": step, "train/loss": 0.0})
    writer.close()
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "step 2: Broken got no metrics (OSError: no space left on device)"
    ]
    assert sink.written == [1, 4], "it is tried again at every step"
    assert len((directory.path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_that_cannot_write_its_own_metrics_stops(directory: RunDirectory) -> None:
    (directory.path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics.jsonl: cannot be written \(Is a directory\)"):
        MetricsWriter(directory).write({"step": 1})


def test_undeclared_metrics_are_written_and_named_once(
    directory: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    writer = MetricsWriter(directory)
    with caplog.at_level(logging.WARNING):
        writer.write({"step": 1, "train/typo": 1.0})
        writer.write({"step": 2, "train/typo": 1.0})
    assert [record.getMessage() for record in caplog.records] == ["metrics that are not in the catalogue: train/typo"]
    assert "train/typo" in (directory.path / "metrics.jsonl").read_text()


def test_a_missing_library_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        require_library("no_such_module_here", "no-such-package", "metrics.tensorboard", True)
    assert str(caught.value) == (
        "metrics.tensorboard = True: needs the package no-such-package, which is not installed; "
        "run `pip install no-such-package`, or leave the setting out"
    )


def test_a_port_beyond_the_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="prometheus_port = 70000: must lie in"):
        MetricsConfig(prometheus_port=70000)
