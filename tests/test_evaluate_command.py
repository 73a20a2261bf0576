"""`coordexp evaluate`: its files, its one-line errors, normalised and semantic matching."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_coordinate_calibration import gaussian, save

from command import call
from coordexp.errors import ConfigError
from coordexp.evaluate.bootstrap import wilson
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.result import evaluate_files
from coordexp.evaluate.samples import normalise
from coordexp.evaluate.semantic import nearest_names

Row = dict[str, Any]
BOX = [10.0, 10.0, 50.0, 60.0]


def lines(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files(
    folder: Path, *, true: str = "black cat", predicted: str = "black cat", metadata: Row | None = None, n: int = 4
) -> tuple[Path, Path]:
    records = [
        {
            "images": [f"{i}.png"],
            "width": 100,
            "height": 80,
            "image_id": str(i),
            "metadata": metadata or {},
            "objects": [{"desc": true, "bbox_2d": BOX}],
        }
        for i in range(n)
    ]
    rows = [
        {
            "image_id": str(i),
            "width": 100,
            "height": 80,
            "score_source": "token",
            "problems": {"bad_arity": i % 2},
            "objects": [{"desc": predicted, "bbox_2d": BOX, "score": 0.5}],
        }
        for i in range(n)
    ]
    return lines(folder / "p.jsonl", rows), lines(folder / "r.jsonl", records)


def test_the_command_writes_three_files_and_prints_the_headline(tmp_path, monkeypatch, capsys):
    predictions, records = files(tmp_path)
    code, out, err = call(monkeypatch, capsys, "evaluate", predictions, "--data", records, "--out", tmp_path / "e", "--bootstrap", "50")
    assert (code, err) == (0, "")
    assert re.search(r"task +detection", out)
    assert re.search(r"F1@\.5 class-aware \(file\) +1\.000 \[0\.510, 1\.000\]", out)
    assert "calibration is left out: no distributions lie beside the predictions" in out
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == ["per_image.jsonl", "results.json", "table.md"]
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert results["per_class"] == [
        {
            "desc": "black cat",
            "true": 4,
            "predicted": 4,
            **{f"f1.{t}": 1.0 for t in ("50", "75", "90", "95", "mean")},
            "recall.50": 1.0,
            "ap": pytest.approx(1),
        }
    ]
    assert results["health.arity_rate"] == 0.5
    assert results["health.max_repeat"] == 1
    table = (tmp_path / "e" / "table.md").read_text()
    titles = ("Headline", "Detection", "COCO average precision", "Errors of each kind (TIDE)", "By object size", "Localisation by size")
    for title in (*titles, "Classes"):
        assert f"## {title}" in table
    for block in re.findall(r"(?:^\|.*\n)+", table, flags=re.M):
        assert len({row.count(" | ") for row in block.splitlines() if not row.startswith("|---")}) == 1, block
    rows = [json.loads(line) for line in (tmp_path / "e" / "per_image.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in rows] == list("0123")
    assert (rows[0]["tp_aware"], rows[0]["counted_aware"], rows[0]["true"], rows[0]["edge_error_bins"]) == ([1] * 10, [1] * 10, 1, 0.0)
    assert rows[1]["problems"] == {"bad_arity": 1}
    again, _, _ = call(monkeypatch, capsys, "evaluate", predictions, "--data", records, "--out", tmp_path / "e", "--overwrite", "--json")
    assert again == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda p, r: p.write_text(p.read_text() + p.read_text().splitlines()[0] + "\n"),
            "p.jsonl:5: image_id: expected one row per image",
        ),
        (
            lambda p, r: p.write_text(p.read_text().replace("10.0", "NaN", 1)),
            "p.jsonl:1: objects[0].bbox_2d: expected a finite number, got nan",
        ),
        (lambda p, r: p.write_text(p.read_text().replace('"width": 100', '"width": 90', 1)), "is 90x80 in the predictions and 100x80"),
        (lambda p, r: r.write_text("".join(r.read_text().splitlines(True)[1:])), "1 of 4 predictions have no record in r.jsonl"),
        (lambda p, r: p.write_text("".join(p.read_text().splitlines(True)[1:])), "1 of 4 records have no prediction in p.jsonl"),
        (lambda p, r: p.unlink(), "cannot read the predictions file"),
        (
            lambda p, r: r.write_text(r.read_text().replace('"metadata": {}', '"metadata": {"neg_categories": ["dog"]}', 1)),
            "LVIS rules need it on every",
        ),
        (lambda p, r: (p.parent / "e").write_text(""), "expected a folder, got the file"),
    ],
)
def test_files_that_cannot_be_evaluated_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, change, words):
    predictions, records = files(tmp_path)
    change(predictions, records)
    code, _, err = call(monkeypatch, capsys, "evaluate", predictions, "--data", records, "--out", tmp_path / "e")
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert words in err
    assert not (tmp_path / "e").is_dir()


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"neg_categories": "dog"}, "metadata.neg_categories: expected a list of descriptions"),
        ({"neg_categories": ["Black  Cat"]}, "expected categories without an object, got 'black cat'"),
        ({"neg_categories": [], "category_frequency": {"dog": "x"}}, "metadata.category_frequency: expected 'r', 'c' or 'f'"),
    ],
)
def test_malformed_lvis_metadata_names_the_record(tmp_path, monkeypatch, capsys, metadata, words):
    predictions, records = files(tmp_path, metadata=metadata)
    code, _, err = call(monkeypatch, capsys, "evaluate", predictions, "--data", records, "--out", tmp_path / "e")
    assert (code, err.count("\n")) == (2, 1)
    assert "r.jsonl:1: " in err
    assert words in err


def test_lvis_metadata_adds_lvis_ap_and_its_interval(tmp_path):
    metadata = {"neg_categories": ["dog"], "not_exhaustive_categories": [], "category_frequency": {"black cat": "r"}}
    paths = files(tmp_path, metadata=metadata)
    results = evaluate_files(*paths, EvaluateOptions(bootstrap=20), out=None)
    assert (results["lvis.file.ap"], results["lvis.file.apr"], results["lvis.file.apf"]) == (pytest.approx(1), pytest.approx(1), None)
    assert results["intervals.lvis.file.ap"] == pytest.approx(wilson(1, 4))
    assert any(note.startswith("LVIS rules") for note in results["notes"])


@pytest.mark.parametrize(
    ("text", "form"), [("  Black \t cat\n", "black cat"), ("STRASSE", "straße"), ("ﬁre truck", "Fire Truck"), ("É", "e\u0301")]
)
def test_descriptions_are_compared_normalised(tmp_path, text, form):
    assert normalise(text) == normalise(form)
    assert normalise(normalise(text)) == normalise(text)
    results = evaluate_files(*files(tmp_path, true=form, predicted=text), EvaluateOptions(bootstrap=0), out=None)
    assert results["detection.file.aware.f1.50"] == 1
    assert results["coco.constant.ap"] == pytest.approx(1)


def test_different_words_do_not_match_exactly(tmp_path):
    results = evaluate_files(*files(tmp_path, predicted="black cats"), EvaluateOptions(bootstrap=0), out=None)
    assert (results["detection.file.aware.f1.50"], results["detection.file.agnostic.f1.50"]) == (0, 1)


def test_distributions_beside_the_predictions_add_calibration(tmp_path):
    paths = files(tmp_path)
    edges = [v / side * 999 for v, side in zip(BOX, (100, 80, 100, 80), strict=True)]
    save(tmp_path / "p.jsonl.distributions", [(str(i), 0, s, gaussian(edges[s], 4)) for i in range(4) for s in range(4)])
    results = evaluate_files(*paths, EvaluateOptions(bootstrap=20), out=None)
    assert (results["calibration.all.n"], results["calibration.x1.n"]) == (16, 4)
    assert results["calibration.all.coverage_50"] == 1
    assert not any("calibration" in note for note in results["notes"])


VECTORS = {"black cat": (1, 0), "dog": (0, 1), "kitten": (0.9, 0.3), "tree": (-1, -1)}


def embed(texts):
    return np.array([VECTORS[text] for text in texts], dtype=float)


def test_semantic_matching_renames_only_what_no_record_says_and_what_is_near(tmp_path):
    assert nearest_names(["Kitten", "tree", "dog"], ["Black cat", "dog"], embed, similarity=0.7) == {"kitten": "black cat"}
    assert nearest_names(["kitten"], ["dog"], embed, similarity=0.7) == {}
    assert nearest_names(["dog"], ["dog"], embed, similarity=0.7) == {}
    with pytest.raises(ValueError, match="finite vectors"):
        nearest_names(["x"], ["dog"], lambda texts: np.zeros((2, 3)), similarity=0.7)
    options = EvaluateOptions(bootstrap=0, match="semantic", match_model="some/folder/encoder")
    results = evaluate_files(*files(tmp_path, predicted="kitten"), options, out=None, embed=embed)
    assert results["detection.file.aware.f1.50"] == 1
    assert results["renamed"] == {"kitten": "black cat"}
    assert results["provenance"]["options"]["match_model"] == "encoder"
    with pytest.raises(ConfigError, match="needs a text model"):
        evaluate_files(*files(tmp_path), options, out=None)


def tiny_encoder(folder: Path) -> Path:
    """A random BERT of 2 layers that knows a few words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast, set_seed

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "black", "cat", "dog", "tree", "a"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    set_seed(0)
    BertModel(
        BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(folder)
    return folder


def test_semantic_matching_with_a_local_text_model_from_the_command_line(tmp_path, monkeypatch, capsys):
    from coordexp.modeling.embed import text_embedder

    encoder = tiny_encoder(tmp_path / "encoder")
    vectors = text_embedder(encoder)(["black cat", "dog", "a black cat dog tree"])
    assert vectors.shape == (3, 16)
    # Padding must not change a vector.
    np.testing.assert_allclose(text_embedder(encoder)(["dog"])[0], vectors[1], atol=1e-6)
    predictions, records = files(tmp_path, predicted="a black cat")
    words = ("evaluate", predictions, "--data", records, "--out", tmp_path / "e", "--overwrite", "--bootstrap", "0", "--match", "semantic")
    code, _, _ = call(monkeypatch, capsys, *words, "--match-model", encoder, "--match-similarity", "-1")
    assert code == 0
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert (results["renamed"], results["detection.file.aware.f1.50"]) == ({"a black cat": "black cat"}, 1)
    for more, message in (
        ((), "--match-model: expected the folder of a text model"),
        (("--match-model", tmp_path), "expected the folder of a text model (config.json"),
    ):
        code, _, err = call(monkeypatch, capsys, *words, *more)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    code, _, err = call(monkeypatch, capsys, *words[:-1], "nearly")
    assert (code, err) == (2, "error: --match: expected exact or semantic, got nearly\n")


def test_results_that_are_there_are_kept_unless_told_otherwise(tmp_path, monkeypatch, capsys):
    predictions, records = files(tmp_path)
    words = ("evaluate", predictions, "--data", records, "--out", tmp_path / "e", "--bootstrap", "0")
    assert call(monkeypatch, capsys, *words)[0] == 0
    before = (tmp_path / "e" / "results.json").read_bytes()
    code, _, err = call(monkeypatch, capsys, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds results already" in err
    assert (tmp_path / "e" / "results.json").read_bytes() == before
