"""Grounding and pointing from a record to its answer: the phrase in the prompt, the geometry of answers, one contract for both ends."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_experiment import SMALL, _experiment, _sets

from command import call
from coordexp import distribution
from coordexp.codec import CoordCodec
from coordexp.data.answers import PHRASE_FIELD, answer_geometries, ask, drawn_as, record_instances
from coordexp.data.dataset import RecordDataset
from coordexp.data.options import SynthOptions
from coordexp.data.packed import data_digest, template_digest
from coordexp.data.records import Record, RecordObject, read_records
from coordexp.data.synthetic import make_scene, scene_seed, write_scenes
from coordexp.decode.generate import Generated
from coordexp.decode.options import DecodeOptions
from coordexp.decode.predict import predict, read_answer
from coordexp.decode.scores import fit_calibration
from coordexp.decode.tokens import token_bytes
from coordexp.errors import ComparisonError, ConfigError, DataError
from coordexp.evaluate.distributions import distributions_folder, read_distributions
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.predictions import read_predictions
from coordexp.evaluate.result import evaluate_files
from coordexp.grammar import ROLE_CODES, parse, render
from coordexp.predicting import probe
from coordexp.train.best import check_best
from coordexp.train.options import TrainOptions
from predicting import model
from tiny import fresh_model, records, template, vocab

CODEC = CoordCodec()
BOX = RecordObject("cup", "bbox_2d", (10.0, 20.0, 30.0, 60.0))
TRIANGLE = RecordObject("flag", "poly", (10.0, 10.0, 30.0, 10.0, 10.0, 50.0))
POINT = RecordObject("dot", "point_2d", (7.0, 9.0))
ASKING = dataclasses.replace(template(), prompt=f"Where is the {PHRASE_FIELD}?")


def record(*objects: RecordObject, **metadata: object) -> Record:
    return Record(Path("a.png"), 100, 200, objects, "a", metadata, "r.jsonl:3")


@given(st.text(), st.text(min_size=1).filter(lambda text: text.strip() and "<|" not in text))
def test_a_phrase_stands_where_the_prompt_says_and_nothing_else_of_it_changes(rest, phrase):
    rest = rest.replace("{", "(")
    assert ask(rest, record()) == rest
    assert ask(f"a {PHRASE_FIELD} b {PHRASE_FIELD}", record(phrase=phrase)) == f"a {phrase} b {phrase}"


@pytest.mark.parametrize("metadata", [{}, {"phrase": 3}, {"phrase": " "}, {"phrase": "the <|coord_1|> one"}])
def test_a_record_that_cannot_be_asked_about_is_named(metadata):
    with pytest.raises(DataError, match=r"^r\.jsonl:3: metadata\.phrase: expected "):
        ask(ASKING.prompt, record(**metadata))


def test_a_misspelt_field_is_not_asked_as_it_stands():
    with pytest.raises(ConfigError, match=r"\{phrases\} is no field of it: expected \{phrase\}"):
        ask("Locate {phrases}.", record(phrase="a"))
    assert ask('Answer like {"box": []} or {}: {phrase}', record(phrase="{x}")) == 'Answer like {"box": []} or {}: {x}'


def referring(tmp_path, task="grounding", count=6):
    options = SynthOptions(train=count, val=4, test=4, side=64, min_objects=2, max_objects=3, seed=2, task=task)
    return options, write_scenes(tmp_path / "data", options)


def test_the_same_image_is_asked_about_each_phrase_alike_in_training_and_prediction(tmp_path):
    _, files = referring(tmp_path)
    found = read_records(files["train"]).records[0]
    other = dataclasses.replace(found, metadata={"phrase": "large pink cube"})
    ids = []
    for item in (found, other):
        prompt, example = ASKING.encode_prompt(item), ASKING.encode(item)
        head = next(i for i, role in enumerate(example.roles) if role)
        assert example.input_ids[:head] == prompt.input_ids
        text = ASKING.tokenizer.decode(prompt.input_ids, skip_special_tokens=False)
        assert text.count(f"Where is the {item.metadata['phrase']}?") == 1
        ids.append(prompt.input_ids)
    assert ids[0] != ids[1]


def test_lengths_of_samples_count_their_phrases(tmp_path):
    _, files = referring(tmp_path)
    samples = RecordDataset(read_records(files["train"]).records, ASKING)
    assert samples.token_counts() == [len(samples[i].input_ids) for i in range(len(samples))]


def test_a_box_becomes_its_centre_and_a_polygon_its_bounding_box():
    assert drawn_as(BOX, "point_2d").values == (20, 40)
    assert drawn_as(TRIANGLE, "bbox_2d").values == (10, 10, 30, 50)
    assert [drawn_as(item, "recorded") for item in (BOX, TRIANGLE, POINT)] == [BOX, TRIANGLE, POINT]
    assert drawn_as(POINT, "point_2d") is POINT
    with pytest.raises(DataError, match=r"^x:1: a point_2d has no box: .*'dot'"):
        drawn_as(POINT, "bbox_2d", "x:1")
    (instance,), moved = record_instances(record(BOX), CODEC, geometry="point_2d")
    assert (instance.geometry, instance.bins, moved) == ("point_2d", (200, 200), 0)
    np.testing.assert_allclose(instance.centers, (20 / 100 * 999, 40 / 200 * 999))
    assert instance.extents == (0, 0)


def test_points_are_sorted_as_points():
    tall, low = RecordObject("tall", "bbox_2d", (0.0, 0.0, 10.0, 100.0)), RecordObject("low", "bbox_2d", (0.0, 20.0, 10.0, 40.0))
    names = {g: [i.desc for i in record_instances(record(tall, low), CODEC, geometry=g)[0]] for g in ("recorded", "point_2d")}
    assert names == {"recorded": ["tall", "low"], "point_2d": ["low", "tall"]}


def test_answers_hold_the_geometries_of_the_records_or_the_one_asked_for():
    crowd = dataclasses.replace(POINT, crowd=True)
    assert answer_geometries([record(TRIANGLE, crowd), record(BOX)]) == ("bbox_2d", "poly")
    assert answer_geometries([record()]) == ("bbox_2d",)
    assert answer_geometries([record(BOX, TRIANGLE)], "point_2d") == ("point_2d",)


def test_a_scene_asks_for_one_of_its_objects_by_a_name_no_other_has(tmp_path):
    options, files = referring(tmp_path, count=40)
    chosen = []
    for i, found in enumerate(read_records(files["train"]).records):
        _, scene = make_scene(scene_seed(2, "train", i), options)
        names = [item["desc"] for item in scene]
        (item,) = found.objects
        assert (found.metadata["phrase"], len(set(names))) == (item.desc, len(names))
        assert list(item.values) == next(o["bbox_2d"] for o in scene if o["desc"] == item.desc)
        chosen.append(names.index(item.desc))
    assert set(chosen) >= {0, 1}
    with pytest.raises(ValueError, match="min_objects"):
        SynthOptions(task="grounding", min_objects=0)


def test_a_plan_of_packs_is_made_anew_when_a_phrase_a_crowd_or_the_geometry_changes():
    same = [record(BOX, phrase="a")]
    assert data_digest(same) == data_digest([record(BOX, phrase="a")])
    others = [record(BOX, phrase="b"), record(dataclasses.replace(BOX, crowd=True), phrase="a"), record(BOX)]
    assert len({data_digest([item]) for item in (*same, *others)}) == 4
    assert template_digest(template()) != template_digest(dataclasses.replace(template(), geometry="point_2d"))


@pytest.mark.parametrize("geometry", ["point_2d", "poly"])
def test_constrained_answers_hold_the_geometry_asked_for_and_are_read_as_it(tmp_path, geometry):
    out = tmp_path / "p.jsonl"
    options = DecodeOptions(batch_size=2, max_new_tokens=110, max_objects=2, save_distributions=True)
    done = predict(model(), template(), records("train")[:3], out, vocab=vocab(), options=options, geometries=(geometry,))
    found = read_predictions(out)
    assert done.boxes == sum(len(row.objects) for row in found) > 0
    assert {item.geometry for row in found for item in row.objects} == {geometry}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row, saved in zip(rows, read_distributions(distributions_folder(out)), strict=True):
        for i, item in enumerate(row["objects"]):
            written = item[geometry]
            assert {len(values) for values in item["readouts"].values()} == {len(written)}
            side = np.array([row["width"], row["height"]] * (len(written) // 2))
            assert item["readouts"]["auto"] == written
            probs = torch.from_numpy(saved.dense()[0][i, : len(written)])
            middle = distribution.median(probs / probs.sum(-1, keepdim=True)).numpy() / 999 * side
            np.testing.assert_allclose(middle, item["readouts"]["median"], atol=0.2)


def test_what_was_not_asked_for_is_counted_and_left_out():
    chat = template()
    (instance,), _ = record_instances(record(BOX), CODEC)
    ids = chat.tokenizer(render([instance]).text, add_special_tokens=False)["input_ids"]
    answer = Generated(ids, torch.zeros(4, 1000), truncated=False, log_probs=[0.0] * len(ids))
    for geometries, kept in ((("bbox_2d",), 1), (("point_2d",), 0)):
        row, _ = read_answer(record(BOX), answer, token_bytes(chat.tokenizer), vocab(), CODEC, DecodeOptions(), geometries)
        assert (len(row["objects"]), row["problems"].get("other_geometry", 0)) == (kept, 1 - kept)


def test_points_of_every_readout_are_looked_up_in_the_region(tmp_path):
    truth = {"images": ["a.png"], "width": 100, "height": 100, "image_id": "a", "metadata": {"phrase": "cup"},
             "objects": [{"desc": "cup", "bbox_2d": [10, 10, 20, 20]}]}  # fmt: skip
    row = {"width": 100, "height": 100, "score_source": None,
           "objects": [{"desc": "cup", "point_2d": [50, 50], "readouts": {"median": [15, 15], "argmax": [50, 50]}}]}  # fmt: skip
    for name, content in (("r.jsonl", truth), ("p.jsonl", row)):
        rows = [content | {"image_id": i} | ({"images": [f"{i}.png"]} if "images" in content else {}) for i in "ab"]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = evaluate_files(tmp_path / "p.jsonl", tmp_path / "r.jsonl", EvaluateOptions(bootstrap=50), out=tmp_path / "out")
    assert (results["pointing.acc"], results["pointing.argmax.acc"], results["pointing.median.acc"]) == (0, 0, 1)
    assert "intervals.pointing.median.acc" in results
    assert json.loads((tmp_path / "out" / "per_image.jsonl").read_text().splitlines()[0])["hit_median"] is True


def test_a_model_that_points_has_its_own_metric_in_the_probe(tmp_path):
    _, files = referring(tmp_path)
    found = list(read_records(files["val"]).records)
    values = probe(fresh_model(), dataclasses.replace(ASKING, geometry="point_2d"), found, DecodeOptions(max_new_tokens=20), ("point_2d",))
    assert set(values) == {"probe/parse_rate", "probe/point_acc", "probe/objects_per_image", "probe/duplicate_rate"}
    assert values["probe/point_acc"] == 0
    assert check_best(TrainOptions(save_best="probe/point_acc", probe_steps=2, eval_steps=2), points=True) is True
    for key, points, meant in (("probe/f1_50", True, "probe/point_acc"), ("probe/point_acc", False, "probe/f1_50")):
        with pytest.raises(ConfigError, match=f"did you mean {meant}"):
            check_best(TrainOptions(save_best=key, probe_steps=2, eval_steps=2), points=points)


GROUNDING = "data: {kind: synth, prompt: 'Find the {phrase}.', synth: {task: grounding, min_objects: 2}}\n"


def test_a_run_trains_and_asks_for_points_and_its_checkpoint_knows_it(tmp_path, monkeypatch, capsys):
    text = GROUNDING.replace("data: {", "data: {geometry: point_2d, ")
    experiment = _experiment(tmp_path, text)
    small = [*SMALL, "train.probe_steps=2", "train.probe_samples=2", "train.save_best=probe/point_acc", "decode.max_objects=1"]
    code, out, err = call(monkeypatch, capsys, "run", experiment, "--output-dir", tmp_path / "run", *_sets(*small))
    assert code == 0, err
    assert "generated points on the object 0." in out
    assert "best probe/point_acc: " in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["task"], results["pointing.n"], results["pointing.answered"]) == ("pointing", 4, 1)
    assert "points on the referred object" in (tmp_path / "run" / "report.html").read_text()
    final, test = tmp_path / "run" / "checkpoints" / "final", tmp_path / "run" / "data" / "test.jsonl"
    contract = json.loads((final / "coordexp.json").read_text())
    assert (contract["grammar"]["geometries"], contract["prompt"]) == (["point_2d"], "Find the {phrase}.")
    words = ("predict", final, test, "--max-new-tokens", 90, "--max-objects", 1)
    code, _, _ = call(monkeypatch, capsys, *words, "--out", tmp_path / "again.jsonl")
    assert code == 0
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "run" / "predictions.jsonl").read_text()
    code, _, err = call(monkeypatch, capsys, *words, "--out", tmp_path / "boxes.jsonl", "--geometry", "bbox_2d")
    assert (code, err.count("\n")) == (2, 1)
    assert "--geometry: the checkpoint was trained to write point_2d" in err
    plain = tmp_path / "plain.jsonl"
    row = json.loads(test.read_text().splitlines()[0]) | {"metadata": {}, "images": ["data/images/test-000000.png"]}
    plain.write_text(json.dumps(row) + "\n")
    (tmp_path / "data").symlink_to(tmp_path / "run" / "data")
    code, _, err = call(monkeypatch, capsys, "predict", final, plain, "--out", tmp_path / "c.jsonl")
    assert code == 2
    assert "metadata.phrase: expected a text, got none" in err
    assert not list(tmp_path.glob("c.jsonl*"))


def test_points_as_truth_are_refused_before_training_and_an_unasked_phrase_is_said(tmp_path, monkeypatch, capsys):
    _, files = referring(tmp_path)
    experiment = _experiment(tmp_path, f"data: {{kind: jsonl, source: {tmp_path / 'data'}}}\n")
    small = [pair for pair in SMALL if not pair.startswith("data.synth")]
    row = json.loads(files["test"].read_text().splitlines()[0])
    x, y, *_ = row["objects"][0].pop("bbox_2d")
    row["objects"][0]["point_2d"] = [x, y]
    files["test"].write_text(json.dumps(row) + "\n")
    # Training alone looks at no test record.
    code, out, err = call(monkeypatch, capsys, "train", experiment, "--output-dir", tmp_path / "a", *_sets(*small))
    assert code == 0, err
    assert "6 training records have metadata.phrase, and data.prompt has no {phrase}" in out
    code, _, err = call(monkeypatch, capsys, "run", experiment, "--output-dir", tmp_path / "b", *_sets(*small))
    assert code == 2
    assert "test.jsonl:1: objects: holds a point_2d, and answers are evaluated against regions" in err
    assert not (tmp_path / "b" / "model").exists()


def test_rows_for_ms_swift_ask_the_same_question_and_write_the_same_point(tmp_path, monkeypatch, capsys):
    _, files = referring(tmp_path)
    export = ("data", "export", "swift", files["train"], "--geometry", "point_2d")
    code, out, _ = call(monkeypatch, capsys, *export, "--out", tmp_path / "plain")
    assert code == 0
    assert "6 phrases not asked for, the prompt has no {phrase}" in out
    code, out, _ = call(monkeypatch, capsys, *export, "--prompt", ASKING.prompt, "--out", tmp_path / "swift")
    assert (code, "phrases" in out) == (0, False)
    lines = (tmp_path / "swift" / "train.jsonl").read_text().splitlines()
    for found, line in zip(read_records(files["train"]).records, lines, strict=True):
        user, assistant = json.loads(line)["messages"]
        assert user["content"] == "<image>" + ask(ASKING.prompt, found)
        assert list(parse(assistant["content"], strict=True).instances) == record_instances(found, CODEC, geometry="point_2d")[0]
        (values,) = json.loads(line)["objects"]["bbox"]
        assert tuple(values) == drawn_as(found.objects[0], "point_2d").values


def test_boxes_are_not_calibrated_on_points(tmp_path):
    _, files = referring(tmp_path)
    found = read_records(files["test"]).records
    rows = [
        {
            "image_id": r.image_id,
            "width": r.width,
            "height": r.height,
            "score_source": "token",
            "objects": [{"desc": "x", "point_2d": [1, 1], "score": 0.5}],
        }
        for r in found
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ComparisonError, match="holds a point_2d"):
        fit_calibration(tmp_path / "p.jsonl", files["test"])


def test_coordinate_roles_of_a_point_are_its_two_values(tmp_path):
    _, files = referring(tmp_path)
    found = read_records(files["train"]).records[0]
    example = dataclasses.replace(ASKING, geometry="point_2d").encode(found)
    places = [i for i, role in enumerate(example.roles) if role == ROLE_CODES["coord"]]
    assert [example.slots[i] for i in places] == [0, 1]
    x1, y1, x2, y2 = found.objects[0].values
    np.testing.assert_allclose([example.centers[i] for i in places], [(x1 + x2) / 2 / 64 * 999, (y1 + y2) / 2 / 64 * 999])
    text = ASKING.tokenizer.decode([i for i, role in zip(example.input_ids, example.roles, strict=True) if role], skip_special_tokens=False)
    (instance,) = parse(text.removesuffix(ASKING.tokenizer.eos_token), strict=True).instances
    assert instance.geometry == "point_2d"
