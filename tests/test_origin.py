"""Predictions of other records are refused wherever the two meet; `--overwrite` removes what coordexp wrote and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from command import call
from coordexp.data.importers.base import ImportOptions
from coordexp.data.importers.formats import import_data
from coordexp.data.records import read_records
from coordexp.data.staging import OWN, atomic_text, staged_folder
from coordexp.decode.scores import fit_calibration
from coordexp.doctor.predictions import check_predictions
from coordexp.errors import ComparisonError, ConfigError
from coordexp.evaluate.origin import RECORDS_KEY, check_origin, records_sha256, settings_path
from coordexp.evaluate.predictions import read_predictions
from coordexp.runs.manifest import RunDirectory
from run_fixture import manifest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
BOX = [10.0, 10.0, 50.0, 60.0]


def rows(split, *, labels="cat", n=4):
    return [
        {
            "images": [f"images/{split}/{i}.png"], "width": 100, "height": 80, "image_id": str(i),
            "objects": [{"desc": labels, "bbox_2d": BOX}],
        }
        for i in range(n)
    ]  # fmt: skip


def write(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture
def files(tmp_path):
    """Two splits that number their photos from 0, and a prediction of the first, with its settings."""
    made = {split: write(tmp_path / f"{split}.jsonl", rows(split)) for split in ("train", "val")}
    found = [{key: row[key] for key in ("image_id", "width", "height")} | {"score_source": "token"} for row in rows("train")]
    predictions = write(tmp_path / "p.jsonl", [row | {"objects": [{"desc": "cat", "bbox_2d": BOX, "score": 0.5}]} for row in found])
    truth = read_records(made["train"], check_images=False).records
    settings_path(predictions).write_text(json.dumps({RECORDS_KEY: records_sha256(truth)}))
    return predictions, made


def commands(predictions, records, folder):
    """Every command that holds predictions against records."""
    return {
        "evaluate": ("evaluate", predictions, "--data", records, "--out", folder / "e"),
        "render": ("data", "render", records, "--predictions", predictions, "--out", folder / "r"),
    }


def test_predictions_of_another_split_are_refused_by_every_command_in_one_line(files, tmp_path, monkeypatch, capsys):
    predictions, made = files
    for split in made:
        (tmp_path / "images" / split).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (100, 80)).save(tmp_path / "images" / split / f"{i}.png")
    for split, refused in (("val", True), ("train", False)):
        for name, words in commands(predictions, made[split], tmp_path / split).items():
            code, _, err = call(monkeypatch, capsys, *words)
            assert (code == 2) == refused, (name, err)
            assert not refused or (err.count("\n") == 1 and "was not predicted from" in err and "another split?" in err), name
    for meet in (check_predictions, fit_calibration):
        with pytest.raises(ComparisonError, match="was not predicted from"):
            meet(predictions, made["val"])
    assert fit_calibration(predictions, made["train"]).boxes == 4


def test_what_is_known_of_the_records_stands_in_the_results(files, tmp_path, monkeypatch, capsys):
    predictions, made = files

    def basis(records, *more):
        out = tmp_path / "e"
        shutil.rmtree(out, ignore_errors=True)
        code, _, _ = call(monkeypatch, capsys, "evaluate", predictions, "--data", records, "--out", out, *more)
        results = json.loads((out / "results.json").read_text()) if code == 0 else {"provenance": {"records_match": None}, "notes": []}
        return results["provenance"]["records_match"], " ".join(results["notes"])

    assert basis(made["train"]) == ("settings", basis(made["train"])[1])
    # Mended labels are no other records.
    assert basis(write(tmp_path / "mended.jsonl", rows("train", labels="dog")))[0] == "settings"
    assert basis(made["val"])[0] is None
    forced, note = basis(made["val"], "--force")
    assert forced == "forced"
    assert "made for other records" in note
    settings_path(predictions).unlink()
    unknown, note = basis(made["val"])
    assert unknown == "ids and sizes"
    assert "no settings file" in note


def test_held_out_predictions_may_be_a_part_of_the_records(files, tmp_path):
    predictions, _ = files
    longer = read_records(write(tmp_path / "longer.jsonl", rows("train", n=9)), check_images=False).records
    truth = {record.image_id: record for record in longer}
    assert check_origin(read_predictions(predictions), truth, predictions, tmp_path / "longer.jsonl") == "settings"


# --overwrite


def coco(folder):
    """A COCO data set of one photo."""
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(folder / "images" / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 20}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder / "annotations.json"


def precious(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"schema": 1}')
    return folder


FOREIGN = {
    "another program's manifest": ("manifest.json", "thesis.txt"),
    "photos and lists": ("images/holiday.jpg", "notes.jsonl"),
    "a model": ("config.json", "model.safetensors", "tokenizer.json"),
    "results": ("results.json", "table.md"),
    "a forged mark": (OWN, "thesis.txt"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_overwrite_never_removes_what_coordexp_did_not_write(name, tmp_path, monkeypatch, capsys):
    source = coco(tmp_path / "coco")
    records = write(tmp_path / "records.jsonl", rows("train", n=1))
    (tmp_path / "images" / "train").mkdir(parents=True)
    Image.new("RGB", (100, 80)).save(tmp_path / "images" / "train" / "0.png")
    model = precious(tmp_path / "model", "config.json", "tokenizer_config.json")
    words = {
        "run": ("run", EXPERIMENTS / "demo.yaml", "--output-dir"),
        "synth": ("data", "synth", "--train", 1, "--val", 1, "--test", 1, "--out"),
        "import": ("data", "import", "coco", source, "--out"),
        "export-swift": ("data", "export", "swift", records, "--out"),
        "extend": ("vocab", "extend", model, "--out"),
        "tiny": ("model", "tiny", "--hidden-size", 24, "--num-layers", 1, "--out"),
        "evaluate": ("evaluate", records, "--data", records, "--out"),
    }
    for command, line in words.items():
        folder = precious(tmp_path / command, *FOREIGN[name])
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        code, _, err = call(monkeypatch, capsys, *line, folder, "--overwrite")
        assert code == 2, command
        assert err.startswith("error: "), command
        # Evaluation writes beside other files; it stops at its own names only.
        assert str(folder) in err or (command == "evaluate" and name != "results"), (command, err)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, command


def test_overwrite_replaces_what_the_same_command_wrote_unless_something_was_added(tmp_path):
    source = coco(tmp_path / "coco")
    out = tmp_path / "out"
    for _ in range(2):
        import_data("coco", source, out, ImportOptions(), overwrite=True)
    (out / OWN).unlink()  # as an import of before there were marks left it
    import_data("coco", source, out, ImportOptions(), overwrite=True)
    with pytest.raises(ConfigError, match="is no model that coordexp wrote"), staged_folder(out, kind="model", overwrite=True):
        pass
    (out / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=r"holds 'thesis\.txt'"):
        import_data("coco", source, out, ImportOptions(), overwrite=True)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ConfigError, match="a file or a link"):
        import_data("coco", source, tmp_path / "link", ImportOptions(), overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [OWN, "annotations.jsonl", "images", "import.json", "thesis.txt"]


def test_a_run_of_an_older_version_is_recognised_and_a_run_within_it_protects_it(tmp_path):
    make = {"name": "a", "config_yaml": "", "command": ["coordexp", "run"]}
    old = tmp_path / "old"
    old.mkdir()
    (old / "manifest.json").write_text(json.dumps(manifest("complete")))
    (old / "report.html").touch()
    assert sorted(p.name for p in RunDirectory.create(old, **make, overwrite=True).path.iterdir()) == ["config.yaml", "manifest.json"]
    RunDirectory.create(old / "inner", **make)
    with pytest.raises(ConfigError, match="holds another run, inner"):
        RunDirectory.create(old, **make, overwrite=True)
    shutil.rmtree(old / "inner")
    (tmp_path / "link").symlink_to(old)
    with pytest.raises(ConfigError, match="is a link"):
        RunDirectory.create(tmp_path / "link", **make, overwrite=True)
    assert (old / "manifest.json").is_file()


def test_a_temporary_file_is_nobodys_to_foresee_and_a_name_without_utf8_is_written_as_json_reads_it(tmp_path):
    seen = set()
    for _ in range(3):
        with atomic_text(tmp_path / "a.json") as file:
            file.write(json.dumps({"path": "caf\udce9"}, ensure_ascii=False))
            seen |= {path.name for path in tmp_path.iterdir()} - {"a.json"}
    assert len(seen) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": "caf\udce9"}
