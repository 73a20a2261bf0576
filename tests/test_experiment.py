"""One command from data to report, and what bad input gets: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import shutil

import pytest

from command import call
from tiny import workspace

SMALL = [
    "data.synth.train=12", "data.synth.val=4", "data.synth.test=4", "data.synth.side=64", "model.tiny.hidden_size=48",
    "model.tiny.num_layers=2", "model.tiny.num_heads=4", "model.tiny.num_key_value_heads=2", "model.tiny.intermediate_size=64",
    "model.tiny.vision_depth=2", "model.tiny.vision_hidden_size=32", "model.tiny.vision_intermediate_size=48",
    "model.tiny.vision_heads=2", "model.tiny.max_pixels=4096", "train.max_steps=3", "train.per_device_train_batch_size=4",
    "train.train_sampling_strategy=group_by_length",
    "train.logging_steps=1", "train.eval_steps=2", "train.save_steps=2", "decode.max_new_tokens=90", "evaluate.bootstrap=20",
]  # fmt: skip


def _sets(*pairs):
    return [word for pair in pairs for word in ("--set", pair)]


def _experiment(folder, text="data: {kind: synth}\n"):
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def test_run_goes_from_data_to_report_and_every_stage_reruns_from_disk(tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    experiment = _experiment(tmp_path)
    code, out, _ = call(monkeypatch, capsys, "run", experiment, "--output-dir", run_dir, *_sets(*SMALL))
    assert code == 0
    assert "[6/6] report" in out
    assert "report.html" in out.splitlines()[-1]
    assert json.loads((run_dir / "audit.json").read_text())["rules"]
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert list(manifest["stages"]) == ["data", "model", "train", "predict", "evaluate", "report"]
    rows = [json.loads(line) for line in (run_dir / "logging.jsonl").read_text().splitlines()]
    assert (rows[0]["kind"], rows[0]["world_size"]) == ("header", 1)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert {row["step"] for row in rows if "eval_loss" in row} == {2, 3}
    assert list((run_dir / "tensorboard").rglob("events.*"))
    assert (run_dir / "checkpoints" / "checkpoint-2" / "preprocessor_config.json").is_file()
    results = json.loads((run_dir / "results.json").read_text())
    assert results["counts"]["effective"] == 4
    # Constrained by default.
    assert json.loads((run_dir / "predictions.jsonl.settings.json").read_text())["constrained"] is True
    assert results["health.parse_rate"] == 1.0

    final, test = run_dir / "checkpoints" / "final", run_dir / "data" / "test.jsonl"
    again = tmp_path / "again.jsonl"
    code, _, _ = call(monkeypatch, capsys, "predict", final, test, "--out", again, "--max-new-tokens", 90)
    assert code == 0
    assert again.read_text() == (run_dir / "predictions.jsonl").read_text()
    code, out, _ = call(monkeypatch, capsys, "evaluate", again, "--data", test, "--out", tmp_path / "again", "--bootstrap", 20, "--json")
    assert code == 0
    assert {k: v for k, v in json.loads(out).items() if k != "provenance"} == {k: v for k, v in results.items() if k != "provenance"}
    code, out, _ = call(monkeypatch, capsys, "report", run_dir)
    assert code == 0

    code, _, err = call(monkeypatch, capsys, "run", experiment, "--output-dir", run_dir, *_sets(*SMALL))
    assert code == 2
    assert err.count("\n") == 1
    assert "--overwrite" in err


def test_a_run_on_records_elsewhere_with_a_real_model_folder(tmp_path, monkeypatch, capsys):
    experiment = _experiment(tmp_path, "data: {kind: jsonl, source: none}\nvocab: {extend: false}\n")
    run_dir = tmp_path / "run"
    words = [
        f"data.source={workspace() / 'data'}", f"model.path={workspace() / 'model'}", "data.max_test=2",
        *(s for s in SMALL if s.startswith(("train", "decode", "evaluate"))),
    ]  # fmt: skip
    code, _, err = call(monkeypatch, capsys, "run", experiment, "--output-dir", run_dir, *_sets(*words))
    assert code == 0, err
    assert len((run_dir / "predictions.jsonl").read_text().splitlines()) == 2
    assert "pictures" not in json.loads((run_dir / "manifest.json").read_text())["notes"]


def test_a_run_records_its_image_size_and_prompt_and_they_are_enforced_afterwards(tmp_path, monkeypatch, capsys):
    source = workspace() / "model"
    text = f"data: {{kind: jsonl, source: {workspace() / 'data'}, prompt: Point.}}\nmodel: {{path: {source}, max_pixels: 2304}}\n"
    experiment, run_dir = _experiment(tmp_path, text + "vocab: {extend: false}\n"), tmp_path / "run"
    words = [s for s in SMALL if s.startswith(("train", "decode", "evaluate"))]
    code, _, err = call(monkeypatch, capsys, "run", experiment, "--output-dir", run_dir, *_sets(*words))
    assert code == 0, err
    assert json.loads((source / "preprocessor_config.json").read_text())["size"]["longest_edge"] == 4096
    for name in ("model", "checkpoints/checkpoint-2", "checkpoints/final"):
        folder = run_dir / name
        assert json.loads((folder / "preprocessor_config.json").read_text())["size"]["longest_edge"] == 2304
        contract = json.loads((folder / "coordexp.json").read_text())
        assert (contract["prompt"], contract["pixels"]["max_pixels"]) == ("Point.", 2304)

    # Neither is given again: the folder knows both, and what it writes is what the run wrote.
    predict = ("predict", run_dir / "checkpoints/final", workspace() / "data/test.jsonl", "--max-new-tokens", 90)
    code, _, err = call(monkeypatch, capsys, *predict, "--out", tmp_path / "p.jsonl")
    assert (code, err) == (0, "")
    assert (tmp_path / "p.jsonl").read_text() == (run_dir / "predictions.jsonl").read_text()
    code, _, err = call(monkeypatch, capsys, *predict, "--out", tmp_path / "q.jsonl", "--prompt", "Other.")
    assert (code, err.count("\n")) == (2, 1)
    assert "--prompt: the checkpoint was trained with 'Point.'" in err

    again = [f"model.path={run_dir / 'checkpoints/final'}", "data.prompt=Other.", "model.max_pixels=4096"]
    code, _, err = call(monkeypatch, capsys, "run", experiment, "--output-dir", tmp_path / "run2", *_sets(*again))
    assert code == 2
    assert [line.split(":")[1].strip() for line in err.splitlines()] == ["data.prompt", "model.max_pixels"]
    assert not (tmp_path / "run2").exists()
    assert not (tmp_path / "q.jsonl").exists()
    assert err.count(", or model.keep_contract to false to teach it another") == 2
    # Training may teach another prompt and size when it is told to; the folder it starts from stays what it was.
    told = _sets(*words, *again, "model.keep_contract=false")
    code, _, err = call(monkeypatch, capsys, "train", experiment, "--output-dir", tmp_path / "run2", *told)
    assert code == 0, err
    for folder, prompt, size in ((tmp_path / "run2", "Other.", 4096), (run_dir, "Point.", 2304)):
        contract = json.loads((folder / "checkpoints/final/coordexp.json").read_text())
        assert (contract["prompt"], contract["pixels"]["max_pixels"]) == (prompt, size)


def _data(folder, change):
    shutil.copytree(workspace() / "data", folder)
    lines = (folder / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    change(folder, row)
    lines[1] = json.dumps(row)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def _cut(folder, row):
    image = folder / row["images"][0]
    image.write_bytes(image.read_bytes()[:200])


def _set_box(value):
    return lambda folder, row: row["objects"][0].update(bbox_2d=value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder, row: (folder / row["images"][0]).unlink(), "images"),
        (_cut, ".png"),
        (_set_box([0, 0, 500, 5]), "objects[0].bbox_2d"),
        (_set_box([0, 0, float("nan"), 5]), "objects[0].bbox_2d"),
        (lambda folder, row: row.update(widht=3), "widht"),
        (lambda folder, row: row.update(images=["../x.png"]), "images"),
    ],
    ids=["missing image", "truncated image", "box outside", "NaN", "unknown key", "path leaves the folder"],
)
def test_bad_records_stop_a_run_before_training_with_one_line(tmp_path, monkeypatch, capsys, change, words):
    _data(tmp_path / "data", change)
    experiment = _experiment(tmp_path, f"data: {{kind: jsonl, source: {tmp_path / 'data'}}}\n")
    run_dir = tmp_path / "run"
    code, _, err = call(monkeypatch, capsys, "run", experiment, "--output-dir", run_dir, *_sets(*SMALL))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert words in err
    assert json.loads((run_dir / "manifest.json").read_text())["status"] == "failed"
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nothing.yaml"], "no such experiment"),
        (["evaluate", "none.jsonl", "--data", "none.jsonl", "--out", "x"], "none.jsonl"),
        (["report", "nowhere"], "nowhere"),
        (["data", "validate", "none.jsonl"], "none.jsonl"),
        (["data", "synth", "--out", "x", "--side", "3"], "side"),
        (["data", "import", "voc", "nowhere", "--out", "x"], "nowhere"),
        (["vocab", "extend", "nowhere", "--out", "x"], "no such model folder"),
        (["vocab", "extend", "nowhere", "--out", "x", "--init", "best"], "mean, digits, ordinal"),
        (["predict", "nowhere", "x", "--out", "y"], "no such model folder"),
        (["predict", "nowhere", "x", "--out", "y", "--readout", "best"], "topk_mean"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_an_empty_file_and_a_model_without_coordinates_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    code, _, err = call(monkeypatch, capsys, "predict", workspace() / "model", tmp_path / "empty.jsonl", "--out", tmp_path / "p")
    assert (code, err.count("\n")) == (2, 1)
    assert "empty.jsonl" in err
    data = workspace() / "data" / "test.jsonl"
    code, _, err = call(monkeypatch, capsys, "predict", workspace() / "tiny", data, "--out", tmp_path / "p")
    assert code == 2
    assert "coordexp vocab extend" in err
    assert not (tmp_path / "p").exists()


def test_an_interrupted_run_says_so_in_its_manifest(tmp_path, monkeypatch, capsys):
    import coordexp.experiment as experiment_module

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment_module._Chain, "model", stop)
    code, out, err = call(monkeypatch, capsys, "run", _experiment(tmp_path), "--output-dir", tmp_path / "run", *_sets(*SMALL))
    assert code == 130
    assert "interrupted" in out + err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["stage"]) == ("interrupted", "model")
