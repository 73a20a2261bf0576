"""Four programs' logs of one run give the same series; what a file may look like, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.errors import DataError
from coordexp.runs.columns import Columns
from coordexp.runs.logs import EVAL_PREFIX, read_log, series
from coordexp.runs.names import OLD_NAMES, kept_name
from planted import Shape, change, healthy, write_events, write_run, write_state, write_swift

ROWS = change(healthy(Shape(rows=40, evals=4), seed=2), lambda row, x: row.update(loss=float("nan")) if row["step"] == 200 else None)
WRITERS = {"run": write_run, "ms-swift": write_swift, "trainer_state": write_state, "tensorboard": write_events}


@pytest.mark.parametrize("source", WRITERS)
def test_every_reader_gives_the_series_of_the_run(source, tmp_path):
    log = read_log(WRITERS[source](tmp_path / "log", ROWS))
    assert log.source == source
    # TensorBoard keeps 32-bit floats.
    tolerance = 1e-6 if source == "tensorboard" else 0.0
    for rows, prefix in ((log.train, ""), (log.eval, EVAL_PREFIX)):
        expected = [row for row in ROWS if any(k.startswith(EVAL_PREFIX) for k in row) == bool(prefix)]
        columns = Columns(rows, prefix)
        keys = {key for row in expected for key in row} - {"step"} - ({"epoch"} if source == "tensorboard" and prefix else set())
        assert keys <= set(columns.keys)
        for key in keys:
            found = columns.raw(key)
            steps, values = series(expected, key)
            assert found.steps.tolist() == steps
            np.testing.assert_allclose(found.values, values, rtol=tolerance, atol=0)
            assert series(rows, key)[0] == steps


def test_a_folder_stands_for_its_one_log(tmp_path):
    write_events(tmp_path / "out" / "runs" / "one", ROWS)
    assert read_log(tmp_path / "out").source == "tensorboard"
    for step in (50, 90, 300):
        write_state(tmp_path / "out" / f"checkpoint-{step}", [row for row in ROWS if row["step"] <= step])
    assert read_log(tmp_path / "out").train[-1]["step"] == 300
    write_run(tmp_path / "out", ROWS)
    assert read_log(tmp_path / "out").source == "run"
    write_events(tmp_path / "two" / "a", ROWS)
    write_events(tmp_path / "two" / "b", ROWS)
    with pytest.raises(DataError, match="event files in 2 folders \\(a, b\\): name one"):
        read_log(tmp_path / "two")


def test_resumed_event_files_replace_the_steps_they_repeat(tmp_path):
    first = [row for row in ROWS if row["step"] <= 300]
    second = change([row for row in ROWS if row["step"] > 200], lambda row, x: row.update(loss=1.0))
    write_events(tmp_path, first)
    write_events(tmp_path / "later", second)
    name = next((tmp_path / "later").iterdir())
    name.rename(tmp_path / name.name.replace("tfevents.", "tfevents.9"))
    (tmp_path / "later").rmdir()
    log = read_log(tmp_path)
    steps, values = series(log.train, "loss")
    assert steps == [row["step"] for row in ROWS if "loss" in row]
    assert values[20:] == [1.0] * 20
    assert any("steps restart at 210" in note for note in log.notes)


def test_arguments_in_event_files_are_settings(tmp_path):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    writer = EventFileWriter(str(tmp_path))
    text = make_tensor_proto([json.dumps({"gradient_accumulation_steps": 8}).encode()], shape=[1])
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    writer.add_event(Event(step=0, summary=Summary(value=[Summary.Value(tag="args/text_summary", tensor=text, metadata=metadata)])))
    writer.add_event(Event(step=1, summary=Summary(value=[Summary.Value(tag="train/loss", simple_value=2.0)])))
    writer.close()
    assert read_log(tmp_path).settings["gradient_accumulation_steps"] == 8


def test_ms_swift_rows_steps_and_trailer(tmp_path):
    lines = [
        {"loss": "2.5", "global_step/max_steps": "1/20", "elapsed_time": "3s", "memory(GiB)": 4.1},
        {"loss": 2.5, "global_step/max_steps": "1/20", "elapsed_time": "4s", "memory(GiB)": 4.2},
        {"loss": math.nan, "global_step": 2},
        {"eval_loss": 2.0, "global_step": "2/20"},
        {"train_runtime": 5.0, "train_loss": 2.2, "global_step/max_steps": "2/20"},
        {"log_history": [{"loss": 1}], "global_step": 2},
    ]
    path = tmp_path / "logging.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"loss": 1, "glob')
    log = read_log(path)
    steps, values = series(log.train, "loss")
    assert steps == [1, 2]
    assert values[0] == 2.5
    assert math.isnan(values[1])
    assert series(log.eval, "eval_loss") == ([2], [2.0])
    assert log.settings == {"max_steps": 20}
    assert log.summary["train_loss"] == 2.2
    assert [note.partition(":")[2] for note in log.notes] == [
        "6: the summary row of the trainer was left out",
        "7: the last line is torn (the run stopped while writing it) and was left out",
        " 1 duplicated row counted once",
    ]
    assert log.train[0]["elapsed_time"] == "4s"
    assert Columns(log.train).keys == ("loss", "memory(GiB)")


def test_two_halves_of_one_event_are_one_row_and_a_contradiction_is_two(tmp_path):
    path = tmp_path / "logging.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"step": 1, "grad_norm": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "loss": 4}\n')
    log = read_log(path)
    assert log.train == [{"step": 1, "loss": 2, "grad_norm": 3}, {"step": 2, "loss": 2}, {"step": 2, "loss": 4}]
    assert log.notes == ()


@pytest.mark.parametrize("old", OLD_NAMES)
def test_old_names_come_out_under_the_kept_ones(old, tmp_path):
    path = tmp_path / "logging.jsonl"
    path.write_text(json.dumps({"step": 1, old: 0.5}) + "\n" + json.dumps({"step": 1, "eval_" + old: 0.25}) + "\n")
    log = read_log(path)
    assert log.train == [{"step": 1, OLD_NAMES[old]: 0.5}]
    assert log.eval == [{"step": 1, "eval_" + OLD_NAMES[old]: 0.25}]
    assert kept_name(OLD_NAMES[old]) == OLD_NAMES[old]


def test_where_old_and_kept_name_are_both_there_the_kept_one_counts(tmp_path):
    path = tmp_path / "logging.jsonl"
    path.write_text('{"step": 1, "coord_diag/w1": 1.0, "coord_softce_w1/w1": 2.0}\n')
    assert read_log(path).train == [{"step": 1, "coord_softce_w1/w1": 2.0}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trainer_state.json", "[]", "expected a JSON object"),
        ("trainer_state.json", "{}", "log_history: expected a list"),
        ("trainer_state.json", '{"log_history": [3]}', "log_history\\[0\\]: expected an object"),
        ("trainer_state.json", '{"log_history": [{"loss": 1}]}', "log_history\\[0\\]: step: expected an integer"),
        ("trainer_state.json", '{"log_history": ' + "[" * 100_000, "expected JSON"),
        ("logging.jsonl", "[" * 100_000 + "\n", "expected one JSON object"),
        ("logging.jsonl", '{"global_step/max_steps": "a/3"}\n', "step: expected an integer"),
        ("logging.jsonl", '{"step": -1}\n', "step: expected an integer"),
        ("events.out.tfevents.1", "nonsense", "no scalar values"),
    ],
)
def test_a_file_that_is_no_log_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_log(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(DataError, match="no log: expected"):
        read_log(tmp_path)


VALUES = st.one_of(st.none(), st.floats(), st.integers(-(10**6), 10**6))


@given(st.lists(st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3), max_size=30))
def test_columns_are_the_series_of_every_key(rows):
    rows = [{"step": i, **row} for i, row in enumerate(rows)]
    columns = Columns(rows)
    for key in "abc":
        steps, values = series(rows, key)
        found = columns.series(key)
        assert found.steps.tolist() == steps
        np.testing.assert_array_equal(found.values, values)
        assert (key in columns.keys) == bool(steps)


@given(st.lists(st.binary(max_size=40) | st.text(max_size=40).map(lambda t: t.encode()), max_size=6))
def test_any_bytes_are_a_log_or_a_data_error(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("bytes") / "logging.jsonl"
    path.write_bytes(b"\n".join([b'{"step": 1, "loss": 1.0}', *lines]))
    try:
        log = read_log(path)
    except DataError as error:
        message = str(error)
    else:
        assert log.train[0]["loss"] == 1.0
        return
    assert str(path) in message


def test_a_key_with_numbers_and_text_is_an_error_and_one_of_text_alone_is_no_metric():
    with pytest.raises(DataError, match="step 4: loss: expected a number, got 'high'"):
        Columns([{"step": 3, "loss": 1.0}, {"step": 4, "loss": "high"}]).series("loss")
    assert Columns([{"step": 3, "elapsed_time": "3s"}]).keys == ()


def test_reading_and_auditing_load_no_torch(tmp_path):
    write_events(tmp_path, ROWS)
    code = f"import sys, pathlib, coordexp.runs.audit as a; a.audit(pathlib.Path({str(tmp_path)!r})); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def _factory(folder, rows):
    names = {"step": "current_steps", "learning_rate": "lr"}
    lines = [
        {**{names.get(k, k): v for k, v in row.items()}, "total_steps": 500, "percentage": 1, "elapsed_time": "0:00:32"} for row in rows
    ]
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _wandb(folder, rows):
    columns = ["loss", "learning_rate", "eval_loss"]
    names = [f"run-1 - {tag}" for tag in ("train/loss", "train/learning_rate", "val/loss")]
    lines = ["Step," + ",".join(f'"{name}","{name}__MIN","{name}__MAX"' for name in names)]
    lines += [f"{row['step']}," + ",".join(",".join([str(row.get(c, ""))] * 3) for c in columns) for row in rows]
    (folder / "export.csv").write_text("\n".join(lines))
    return folder / "export.csv"


def _plain(folder, rows):
    names = {"loss": "train_loss", "eval_loss": "val/loss"}
    lines = [json.dumps({names.get(k, k): v for k, v in row.items()}) for row in rows]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "log.jsonl"


@pytest.mark.parametrize(("write", "source"), [(_factory, "llama-factory"), (_wandb, "csv"), (_plain, "jsonl")])
def test_logs_of_other_programs_give_the_same_series(tmp_path, write, source):
    rows = [{"step": i, "loss": 2 / i, "learning_rate": 1e-4 / i} for i in (1, 2, 3)] + [{"step": 3, "eval_loss": 0.5}]
    log = read_log(write(tmp_path, rows))
    assert log.source == source
    assert series(log.train, "loss") == ([1, 2, 3], [2.0, 1.0, 2 / 3])
    assert series(log.train, "learning_rate") == ([1, 2, 3], [1e-4, 5e-5, 1e-4 / 3])
    assert series(log.eval, "eval_loss") == ([3], [0.5])
    assert log.settings == ({"max_steps": 500} if source == "llama-factory" else {})


def test_folders_of_hyperparameters_are_no_runs(tmp_path):
    write_events(tmp_path / "runs" / "Nov25_host", ROWS)
    write_events(tmp_path / "runs" / "Nov25_host" / "1764070000.12", ROWS[:1])
    assert series(read_log(tmp_path).train, "loss")[0][-1] == ROWS[-1]["step"]


@pytest.mark.parametrize(
    "text", ["", "a,b\n1,2\n", "Wall time,Step,Value\n1,2,3\n", "Step,r1 - loss,r2 - loss\n1,2,3\n", "Step,loss\nx,1\n"]
)
def test_a_table_that_is_no_log_of_one_run_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=r"x\.csv") as caught:
        read_log(tmp_path / "x.csv")
    assert "\n" not in str(caught.value)
