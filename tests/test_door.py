"""Small courtesies of the commands: JSON for scripts, what to do after Ctrl-C, stale files, damaged photos."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from command import call
from tiny import fitted_folder, workspace


def test_predict_prints_its_counts_as_json(tmp_path, monkeypatch, capsys):
    out_file = tmp_path / "p.jsonl"
    words = (
        "predict",
        fitted_folder(),
        workspace() / "data" / "test.jsonl",
        "--out",
        out_file,
        "--limit",
        2,
        "--max-new-tokens",
        60,
        "--json",
    )
    code, out, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    found = json.loads(out)
    rows = [json.loads(line) for line in out_file.read_text().splitlines()]
    assert (found["images"], found["boxes"]) == (2, sum(len(row["objects"]) for row in rows))
    assert (found["out"], found["finished"]) == (str(out_file), False)
    assert json.loads(call(monkeypatch, capsys, *words)[1])["finished"] is True


def test_an_interrupted_prediction_says_that_the_same_command_goes_on_and_it_does(tmp_path, monkeypatch, capsys):
    import coordexp.decode.predict as module

    out_file = tmp_path / "p.jsonl"
    words = ("predict", fitted_folder(), workspace() / "data" / "test.jsonl", "--out", out_file, "--batch-size", 2, "--max-new-tokens", 60)
    real, calls = module._Job.batch, []

    def stop_at_the_second_batch(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module._Job, "batch", stop_at_the_second_batch)
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 130
    assert err.endswith(f"{out_file} is incomplete: the same command goes on where it stopped\ninterrupted\n")
    monkeypatch.setattr(module._Job, "batch", real)
    code, out, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    assert "2 images were done already" in out


def test_vocab_commands_print_json(tmp_path, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "vocab", "extend", workspace() / "tiny", "--out", tmp_path / "m", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["num_bins"], found["added"], found["init"], found["out"]) == (1000, True, "ordinal", str(tmp_path / "m"))
    code, out, _ = call(
        monkeypatch, capsys, "vocab", "export", tmp_path / "m", tmp_path / "e", "--prompt", "Go.", "--convention", "norm999", "--json"
    )
    assert code == 0
    assert json.loads(out)["out"] == str(tmp_path / "e")


def test_bench_prints_json(tmp_path, monkeypatch, capsys):
    small = ("--rows", 8, "--coords", 4, "--vocab", 2002, "--dim", 8, "--rounds", 2, "--no-memory")
    code, out, _ = call(monkeypatch, capsys, "bench", "loss", *small, "--json", "--out", tmp_path / "b.csv")
    assert code == 0
    found = json.loads(out)
    assert len(found["rows"]) == len((tmp_path / "b.csv").read_text().splitlines()) - 1
    assert {"variant", "p50_ms"} <= set(found["rows"][0])
    assert found["terms"]


def test_a_truncated_photo_passes_the_import_and_is_named_by_validate(tmp_path, monkeypatch, capsys):
    source = tmp_path / "coco"
    (source / "annotations").mkdir(parents=True)
    (source / "train").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    for name in ("a.jpg", "b.jpg"):
        Image.fromarray(noise).save(source / "train" / name)
    damaged = source / "train" / "b.jpg"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    content = {
        "images": [{"id": i, "file_name": name, "width": 90, "height": 80} for i, name in enumerate(("a.jpg", "b.jpg"))],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 20, 20]} for i in range(2)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (source / "annotations" / "instances_train.json").write_text(json.dumps(content))
    code, out, _ = call(monkeypatch, capsys, "data", "import", "coco", source, "--out", tmp_path / "d")
    assert code == 0
    assert "data validate" in out
    code, _, err = call(monkeypatch, capsys, "data", "validate", tmp_path / "d" / "train.jsonl")
    assert code == 2
    assert err.count("\n") == 1
    assert "train.jsonl:2" in err
    assert "b.jpg" in err
