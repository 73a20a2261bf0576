"""``coordexp compare``: what is compared, what is refused, and that its numbers are those of the runs."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from command import call
from coordexp.config.load import dump_config, load_config
from coordexp.errors import ComparisonError
from coordexp.evaluate.bootstrap import point
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.paired import paired
from coordexp.evaluate.result import evaluate_files
from coordexp.runs.compare import HEADLINE, compare
from coordexp.runs.groups import read_groups
from run_fixture import make_run


def _finish(run, *, seed=0, sigma=8.0):
    """Make a run directory of the fixture one that was really evaluated."""
    source = run / "plain.yaml"
    source.write_text(f"seed: {seed}\ndata: {{kind: synth}}\nobjective: {{sigma: {sigma}}}\n")
    (run / "config.yaml").write_text(dump_config(load_config(source)))
    source.unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= {"files": {}, "peak_memory_mib": {"host": 900.0}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    evaluate_files(run / "predictions.jsonl", run / "data" / "test.jsonl", EvaluateOptions(bootstrap=0), out=run)
    return run


def _worse(run):
    """Move every predicted box of a run, so that it finds less."""
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        for item in row["objects"]:
            x1, y1, x2, y2 = item["bbox_2d"]
            item["bbox_2d"] = [x1 + 0.4 * (x2 - x1), y1 + 0.3 * (y2 - y1), x2, y2]
    (run / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def runs(tmp_path):
    """Two run directories on the same data, the second with worse boxes."""
    a = make_run(tmp_path / "a", images=40)
    b = tmp_path / "b"
    shutil.copytree(a, b)
    _worse(b)
    return _finish(a), _finish(b, sigma=3.0)


def test_the_statistics_that_are_paired_are_the_numbers_of_the_evaluation(runs):
    run = runs[0]
    results = json.loads((run / "results.json").read_text())
    ratios = paired(run / "predictions.jsonl", run / "data" / "test.jsonl", convention="norm999", renamed={}).ratios
    shared = [key for key in ratios if key in results]
    assert len(shared) >= 12
    for key in shared:
        assert point(ratios[key]) == pytest.approx(results[key], rel=1e-12), key


def test_the_thirds_of_the_objects_hold_all_of_them(runs):
    run = runs[0]
    ratios = paired(run / "predictions.jsonl", run / "data" / "test.jsonl", convention="norm999", renamed={}).ratios
    thirds = [ratios[f"recall.third.{name}.50"] for name in ("small", "middle", "large")]
    whole = ratios["detection.file.agnostic.recall.50"]
    assert sum(t.denominator.sum() for t in thirds) == whole.denominator.sum()
    assert sum(t.numerator.sum() for t in thirds) == whole.numerator.sum()


def test_a_worse_arm_is_called_worse_and_everything_is_in_the_json(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cmp"
    code, printed, _ = call(monkeypatch, capsys, "compare", *runs, "--resamples", 500, "--out", out)
    assert code == 0
    assert "worse" in printed
    data = json.loads((out / "comparison.json").read_text())
    assert data["baseline"] == "a"
    assert data["arms"]["b"]["changed"] == ["objective.sigma: 8.0 -> 3.0"]
    d = data["differences"]["b"]["detection.file.agnostic.f1.50"]
    means = [data["arms"][arm]["metrics"]["detection.file.agnostic.f1.50"]["mean"] for arm in "ab"]
    assert d["value"] == pytest.approx(means[1] - means[0])
    assert d["interval"][0] <= d["value"] <= d["interval"][1] < 0
    assert (d["verdict"], d["p_holm"] >= d["p"]) == ("worse", True)
    assert set(data["headline"]) <= {metric.key for metric in HEADLINE}
    assert any("one seed" in note for note in data["notes"])
    page = (out / "comparison.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "F1@.5 class-agnostic" in page


def test_json_goes_to_stdout_alone(runs, tmp_path, monkeypatch, capsys):
    code, printed, _ = call(monkeypatch, capsys, "compare", *runs, "--resamples", 100, "--out", tmp_path, "--json")
    assert code == 0
    assert json.loads(printed)["schema"] == 1


def test_the_same_run_twice_differs_by_nothing(runs, tmp_path):
    twin = tmp_path / "twin"
    shutil.copytree(runs[0], twin)
    data = compare(read_groups([runs[0], twin]), resamples=200).data
    for key in data["headline"]:
        assert data["differences"]["twin"][key]["value"] == 0
        assert data["differences"]["twin"][key]["verdict"] in ("not shown", "no interval")


def test_names_from_data_are_escaped_on_the_page(runs, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "<script>alert(1)<"
    shutil.copytree(runs[1], bad)
    code, _, _ = call(monkeypatch, capsys, "compare", runs[0], bad, "--resamples", 100, "--out", tmp_path / "out")
    assert code == 0
    assert "<script" not in (tmp_path / "out" / "comparison.html").read_text()


def _model(run, width, vocabulary="a"):
    (run / "model").mkdir(exist_ok=True)
    (run / "model" / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "text_config": {"hidden_size": width}}))
    (run / "model" / "tokenizer.json").write_text(vocabulary)


def test_another_base_model_is_said_first_and_another_version_is_listed(runs, tmp_path, monkeypatch, capsys):
    for run, width in zip(runs, (2048, 4096), strict=True):
        _model(run, width)
    manifest = json.loads((runs[1] / "manifest.json").read_text())
    (runs[1] / "manifest.json").write_text(json.dumps(manifest | {"versions": {**manifest["versions"], "torch": "2.99"}}))
    code, printed, _ = call(monkeypatch, capsys, "compare", *runs, "--resamples", 100, "--out", tmp_path / "out")
    assert code == 0
    lines = printed.strip().splitlines()
    assert lines[1].startswith("caution: b has another base model than a (qwen3_vl, width 2048")
    assert any("version of torch: 2.13.0 -> 2.99" in line for line in lines)
    data = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert len(data["cautions"]) == 1
    assert "caution" in (tmp_path / "out" / "comparison.html").read_text()
    same = compare(read_groups([runs[0], shutil.copytree(runs[0], tmp_path / "twin")]), resamples=100).data
    assert (same["cautions"], same["arms"]["twin"]["differs"]) == ([], [])


def test_repeats_of_a_seed_are_all_compared_and_copies_are_refused(runs, tmp_path):
    arms = [tmp_path / "first", tmp_path / "second"]
    for arm, source in zip(arms, runs, strict=True):
        for repeat in range(3):
            run = shutil.copytree(source, arm / f"r{repeat}")
            rows = (run / "predictions.jsonl").read_text().splitlines(keepends=True)
            emptied = [json.dumps(json.loads(row) | {"objects": []}) + "\n" for row in rows[: 8 * repeat]]
            (run / "predictions.jsonl").write_text("".join(emptied + rows[8 * repeat :]))
            _finish(run, sigma=8.0 if source == runs[0] else 3.0)
    data = compare(read_groups(arms), resamples=200).data
    key = "detection.file.agnostic.f1.50"
    by_run = [[json.loads((arm / f"r{k}" / "results.json").read_text())[key] for k in range(3)] for arm in arms]
    assert [data["arms"][arm.name]["metrics"][key]["by_seed"] for arm in arms] == [pytest.approx(values) for values in by_run]
    assert data["differences"]["second"][key]["by_seed"] == pytest.approx([b - a for a, b in zip(*by_run, strict=True)])
    assert any("several runs of seed 0" in note for note in data["notes"])
    shutil.copytree(arms[0] / "r0", arms[0] / "r9")
    with pytest.raises(ComparisonError, match=r"r9: has the seed and the predictions of .*r0: a copy is no second run"):
        read_groups(arms)


def test_average_precision_has_an_interval_over_photos(runs):
    data = compare(read_groups(runs), resamples=100).data
    d = data["differences"]["b"]["coco.constant.ap"]
    assert d["interval"][0] < d["value"] < d["interval"][1] < 0
    assert (data["photos"], data["images"]) == (40, 40)


def _set_config(run, **sections):
    config = yaml.safe_load((run / "config.yaml").read_text())
    for section, values in sections.items():
        config[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def _other_test_set(run):
    lines = (run / "data" / "test.jsonl").read_text().splitlines(keepends=True)
    (run / "data" / "test.jsonl").write_text("".join(lines[:-1]))
    rows = (run / "predictions.jsonl").read_text().splitlines(keepends=True)
    (run / "predictions.jsonl").write_text("".join(rows[:-1]))
    _finish(run)


def _contract(run, codec):
    (run / "model").mkdir(exist_ok=True)
    (run / "model" / "coordexp.json").write_text(json.dumps({"codec": codec, "grammar": {"name": "coord_json", "order": "sorted"}}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, b: _other_test_set(b), "the evaluation set"),
        (lambda a, b: (b / "data" / "train.jsonl").write_text("{}\n"), "the training records"),
        (lambda a, b: _set_config(b, data={"prompt": "Find things."}), "the prompt"),
        (lambda a, b: _set_config(b, data={"max_train": 7}), "how many records"),
        (lambda a, b: [_contract(a, {"convention": "norm999"}), _contract(b, {"convention": "norm1000"})], "the codec"),
        (lambda a, b: _set_config(b, data={"order": "random"}), "the answer's grammar"),
    ],
)
def test_runs_that_differ_in_what_must_be_the_same_are_refused(runs, tmp_path, monkeypatch, capsys, change, says):
    change(*runs)
    code, _, err = call(monkeypatch, capsys, "compare", *runs, "--out", tmp_path / "out")
    assert code == 2
    assert says in err
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_compared_are_refused_in_one_line(runs, tmp_path, monkeypatch, capsys):
    a, b = runs
    for words, says in (
        ([a], "expected at least two run directories"),
        ([a, a], "named twice"),
        ([a, tmp_path / "none"], "expected a run directory"),
        ([a, b, "--baseline", "c"], "expected one of a, b"),
    ):
        code, _, err = call(monkeypatch, capsys, "compare", *words)
        assert (code, len(err.splitlines())) == (2, 1)
        assert says in err
    manifest = json.loads((b / "manifest.json").read_text())
    (b / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    code, _, err = call(monkeypatch, capsys, "compare", a, b)
    assert code == 2
    assert "'interrupted': finish it first" in err
    (b / "manifest.json").write_text(json.dumps(manifest))
    with (b / "predictions.jsonl").open("a") as file:
        file.write("\n")
    code, _, err = call(monkeypatch, capsys, "compare", a, b)
    assert code == 2
    assert "evaluate the run again" in err


def test_folders_of_runs_are_arms_with_seeds(runs, tmp_path):
    arms = []
    for name, run in zip(("soft", "hard"), runs, strict=True):
        for seed in (0, 1):
            shutil.copytree(run, tmp_path / "arms" / name / f"s{seed}")
            _finish(tmp_path / "arms" / name / f"s{seed}", seed=seed, sigma=8.0 if name == "soft" else 3.0)
        arms.append(tmp_path / "arms" / name)
    data = compare(read_groups(arms, "hard"), resamples=200).data
    assert data["baseline"] == "hard"
    assert data["arms"]["soft"]["seeds"] == [0, 1]
    assert data["differences"]["soft"]["detection.file.agnostic.f1.50"]["interval"] is not None
    # The logs of both seeds are the same file: no spread, and no photos to draw.
    assert data["differences"]["soft"]["coord_dist/crps"]["interval"] is None
    assert not any("one seed" in note for note in data["notes"])
