"""The ms-swift plugin without ms-swift: its configuration, the targets of its rows, its batches. tests/ms_swift runs the rest."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coordexp.codec import CoordCodec
from coordexp.config.load import load_config
from coordexp.data.options import DEFAULT_PROMPT
from coordexp.data.records import RecordObject
from coordexp.data.swift_rows import SwiftExportOptions, swift_row
from coordexp.errors import ConfigError, DataError, VocabError
from coordexp.grammar import ROLE_CODES
from coordexp.integrations.ms_swift.checks import check_prompts, contract_of, look_at_rows, refuse_arguments
from coordexp.integrations.ms_swift.options import PluginConfig, read_config
from coordexp.integrations.ms_swift.rows import answers_of, row_targets, token_targets
from coordexp.integrations.ms_swift.samples import EvenSamples, SwiftCollator, SwiftSamples
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.manifest import CHECKPOINT_MANIFEST, CheckpointManifest
from tiny import collator, records, template, vocab, workspace

CODEC = CoordCodec()
GRID = torch.tensor([[1, 2, 2]])


# Configuration


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return {"COORDEXP_CONFIG": str(path)}


def test_the_objective_is_read_from_the_file_that_the_variable_names(tmp_path):
    found = read_config(written(tmp_path, "objective: {sigma: 4, w1: 1e-3}\ntoken_type_metrics: {log_top5: false}\n"))
    assert found.config.objective == CoordObjective(sigma=4.0, w1=0.001)
    assert not found.config.token_type_metrics.log_top5
    assert (found.path.name, found.unused) == ("run.yaml", ())
    assert read_config({}).config == read_config({"COORDEXP_CONFIG": ""}).config == PluginConfig()


def test_an_experiment_gives_its_objective_and_names_what_ms_swift_decides():
    found = read_config({"COORDEXP_CONFIG": "experiments/demo.yaml"})
    assert found.config.objective == load_config(found.path).objective
    assert {"data", "train", "decode"} <= set(found.unused)


def test_every_unknown_key_and_value_is_refused_at_once_with_the_nearest_name(tmp_path):
    text = "objctive: {}\nobjective: {sigm: 4, gate: much, temperature: 0}\ntrain: {learning_rat: 1}\nswift: {convention: norm99}\n"
    with pytest.raises(ConfigError) as caught:
        read_config(written(tmp_path, text))
    assert sorted(caught.value.problems) == [
        "run.yaml: objctive: unknown key: did you mean objective?",
        "run.yaml: objective.gate: expected a number, got 'much'",
        "run.yaml: objective.sigm: unknown key: did you mean objective.sigma?",
        "run.yaml: objective.temperature: expected a positive number, got 0.0",
        "run.yaml: swift.convention: expected one of norm999, norm1000, floor1000, paligemma, got 'norm99'",
        "run.yaml: train.learning_rat: unknown key: did you mean train.learning_rate?",
    ]
    with pytest.raises(ConfigError, match=r"COORDEXP_CONFIG: expected a YAML file, got nothing at .*none.yaml"):
        read_config({"COORDEXP_CONFIG": str(tmp_path / "none.yaml")})


def test_configuration_and_rows_load_without_torch_and_without_ms_swift():
    code = (
        "import sys, coordexp.integrations.ms_swift.options, coordexp.integrations.ms_swift.rows; "
        "print([name for name in ('torch', 'transformers', 'swift') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


# Targets


def mixed(record):
    """The record with a polygon, a point and a box that collapses, between its own objects."""
    extra = (
        RecordObject("leaf", "poly", (10.0, 20.5, 30.0, 4.0, 36.25, 24.0, 20.0, 40.0)),
        RecordObject("an eye", "point_2d", (7.3, 30.5)),
        RecordObject("thin", "bbox_2d", (1.0, 31.5, 1.01, 32.0)),
    )
    return replace(record, objects=(*record.objects, *extra))


def supervised(ids, roles, ignored=-100):
    return [token if role else ignored for token, role in zip(ids, roles, strict=True)]


def same(a, b):
    return len(a) == len(b) and all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["real", "norm1"])
def test_targets_of_exported_rows_are_those_of_training(kind):
    """Bit for bit: the numbers go through the file unrounded."""
    for record in [*records(), mixed(records()[0]), replace(records()[0], objects=())]:
        row, _ = swift_row(record, CODEC, SwiftExportOptions(), record.image)
        row = json.loads(json.dumps(row))
        if kind == "norm1":
            sides = (record.width, record.height) * 2
            row["objects"] |= {
                "bbox_type": "norm1",
                "bbox": [[v / s for v, s in zip(box, sides, strict=False)] for box in row["objects"]["bbox"]],
            }
        expected = template().encode_answer(template().prompt, template().instances(record)[0], GRID)
        labels = supervised(expected["input_ids"], expected["roles"])
        got = token_targets(labels, answers_of(row), row_targets(row, CODEC), template().tokenizer)
        assert (got.roles, got.slots) == (expected["roles"], expected["slots"])
        assert same(got.centers, expected["centers"])
        if kind == "real":
            assert same(got.extents, expected["extents"])
        else:  # a difference of quotients
            assert [e for e in got.extents if e == e] == pytest.approx([e for e in expected["extents"] if e == e], rel=1e-9)


def test_what_is_supervised_after_the_answer_is_format_and_several_answers_share_the_numbers():
    first, second = (swift_row(record, CODEC, SwiftExportOptions(), record.image)[0] for record in records()[:2])
    row = {
        "messages": [*first["messages"], *second["messages"]],
        "images": [*first["images"], *second["images"]],
        "objects": {
            "bbox": first["objects"]["bbox"] + second["objects"]["bbox"],
            "image_id": [0] * len(first["objects"]["bbox"]) + [1] * len(second["objects"]["bbox"]),
        },
    }
    tokenizer, labels, expected = template().tokenizer, [-100] * 3, [0] * 3
    for answer in answers_of(row):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        labels += [*ids, tokenizer.eos_token_id, ids[0], -100, -100]
        expected += [*([None] * len(ids)), ROLE_CODES["format"], ROLE_CODES["format"], 0, 0]
    got = token_targets(labels, answers_of(row), row_targets(row, CODEC), tokenizer)
    assert all(want in (None, role) for want, role in zip(expected, got.roles, strict=True))
    centers = [c for record in records()[:2] for instance in template().instances(record)[0] for c in instance.centers]
    assert [c for c in got.centers if c == c] == centers


def test_without_ground_truth_the_bin_is_the_centre_and_there_is_no_extent():
    row, _ = swift_row(records()[0], CODEC, SwiftExportOptions(), records()[0].image)
    for objects in (None, {}, {"ref": ["a"]}):
        (target,) = row_targets({**row, "objects": objects}, CODEC)
        assert all(center == int(center) for center in target.centers)
        assert all(math.isnan(extent) for extent in target.extents)
        assert {slot[1] for slot in target.slots} == {0, 1, 2, 3}


def _changed(change):
    row, _ = swift_row(records()[0], CODEC, SwiftExportOptions(), records()[0].image)
    row = json.loads(json.dumps(row))
    change(row)
    return row


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["objects"]["bbox"].pop(), r"expected as many numbers as the answer has coordinate tokens \(\d+\), in their order"),
        (lambda r: r["objects"]["bbox"].reverse(), "another convention or another order"),
        (lambda r: r["objects"]["bbox"][0].pop(), "expected 4 finite numbers"),
        (lambda r: r["objects"]["bbox"][0].__setitem__(2, None), "expected 4 finite numbers"),
        (lambda r: r["objects"]["bbox"][0].__setitem__(2, 1e6), "outside the image side"),
        (lambda r: r["objects"].update(bbox_type="norm7"), "objects.bbox_type: expected real or norm1, got 'norm7'"),
        (lambda r: r["objects"].update(image_id=[1]), "objects.image_id: expected one of the 1 images"),
        (lambda r: r.update(images=["nowhere.png"]), "images: expected a file"),
        (lambda r: r["messages"][1].update(content=[1, 2]), "expected the assistant's answer as text"),
        (lambda r: r["messages"][1].update(content="<|coord_1000|>"), "expected as many numbers|expected coordinate tokens below 1000"),
    ],
)
def test_a_row_whose_numbers_do_not_fit_its_tokens_is_refused(change, said):
    if len(records()[0].objects) < 2:
        pytest.fail("the first record must have several objects")
    with pytest.raises(DataError, match=said):
        row_targets(_changed(change), CODEC)


def test_another_convention_is_found_at_its_first_row():
    row, _ = swift_row(records()[0], CoordCodec(1001, "norm1000"), SwiftExportOptions(convention="norm1000"), records()[0].image)
    with pytest.raises(DataError, match=r"under 'norm999', the answer has .*: another convention"):
        look_at_rows("train", [row], CODEC)
    assert look_at_rows("train", [row], CoordCodec(1001, "norm1000")).prompts == (DEFAULT_PROMPT,)


def test_an_image_that_ms_swift_would_show_turned_is_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", exif=exif)
    with pytest.raises(DataError, match="EXIF rotation"):
        row_targets(_changed(lambda r: r.update(images=[{"bytes": None, "path": str(tmp_path / "a.png")}])), CODEC)


numbers = st.lists(st.floats(allow_nan=True) | st.integers(-5, 70) | st.none(), max_size=5)
texts = st.sampled_from(
    ["", "{}", '{"objects": []}', "a <|coord_3|> b <|coord_900|>", '{"objects": [{"desc": "a", "bbox_2d": [<|coord_1|>']
) | st.text(max_size=8)


@given(st.lists(texts, max_size=2), st.lists(numbers, max_size=3), st.sampled_from(["real", "norm1", None]))
@settings(max_examples=200)
def test_any_row_gives_targets_for_each_of_its_tokens_or_a_data_error(answers, boxes, kind):
    row = {
        "messages": [{"role": "assistant", "content": text} for text in answers],
        "images": [str(records()[0].image)],
        "objects": {"bbox": boxes, "bbox_type": kind},
    }
    try:
        targets = row_targets(row, CODEC)
    except DataError:
        return
    assert [len(t.centers) for t in targets] == [text.count("<|coord_") for text in answers]
    assert all(math.isfinite(center) for t in targets for center in t.centers)


def test_labels_that_do_not_hold_the_answer_are_refused():
    row = _changed(lambda r: None)
    targets, tokenizer = row_targets(row, CODEC), template().tokenizer
    ids = tokenizer(answers_of(row)[0], add_special_tokens=False)["input_ids"]
    for labels, said in (
        ([-100, *ids[:-3]], "does not supervise it as it stands"),
        ([-100, 5, *ids], "does not supervise it as it stands"),
        ([-100] * 8, "expected one supervised stretch for each of the 1 answers, got 0"),
    ):
        with pytest.raises(DataError, match=said):
            token_targets(labels, answers_of(row), targets, tokenizer)


# Batches


class Encoder:
    """Stands in for ms-swift's template: the tokens of training, nothing shifted."""

    def __call__(self, row, return_length=False):
        record = next(r for r in records() if str(r.image) == row["images"][0])
        example = template().encode(record)
        return {
            "input_ids": example.input_ids,
            "labels": supervised(example.input_ids, example.roles),
            "pixel_values": example.pixel_values,
            "image_grid_thw": example.image_grid_thw,
        }


def padded(samples):
    """Stands in for ms-swift's collator: right-padded ids and labels."""
    length = max(len(s["input_ids"]) for s in samples)
    pad = template().tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([s["input_ids"] + [pad] * (length - len(s["input_ids"])) for s in samples]),
        "labels": torch.tensor([s["labels"] + [-100] * (length - len(s["labels"])) for s in samples]),
    }


def samples(of=None):
    rows = [swift_row(r, CODEC, SwiftExportOptions(), r.image)[0] for r in (records() if of is None else of)]
    return SwiftSamples("train", rows, Encoder(), template().tokenizer, CODEC)


def test_batches_hold_the_targets_of_the_training_collator():
    chosen = [samples()[i] for i in (0, 3, 5)]
    got = SwiftCollator(padded, "right")(chosen)
    expected = collator()([template().encode(records()[i]) for i in (0, 3, 5)])
    assert torch.equal(got["input_ids"], expected["input_ids"])
    for key, column in expected["targets"].columns().items():
        torch.testing.assert_close(got["targets"].columns()[key], column, rtol=0, atol=0, equal_nan=True)
    assert "labels" not in got
    assert got["targets"].image_ids == [str(records()[i].image) for i in (0, 3, 5)]


def test_left_padding_moves_targets_with_the_labels():
    def left(batch):
        right = padded(batch)
        rows = [row.roll(int((row == -100).flip(0).cumprod(0).sum())) for row in right["labels"]]
        return right | {"labels": torch.stack(rows)}

    got = SwiftCollator(left, "left")([samples()[i] for i in (0, 3)])
    ids = got["targets"].labels
    assert torch.equal(got["targets"].centers.isfinite(), (ids >= vocab().start) & (ids < vocab().start + 1000))


def test_fillers_even_out_the_ranks_and_supervise_nothing():
    few = samples(records()[:5])
    even = EvenSamples(few, multiple=4)
    assert len(even) == 8
    batch = SwiftCollator(padded, "right")([even[i] for i in (4, 5, 7)])
    assert batch["targets"].image_ids == [str(records()[4].image)]
    assert (batch["targets"].labels[1:] == -100).all()
    assert batch["targets"].centers[1:].isnan().all()


def test_a_faulty_row_is_named_and_never_replaced():
    data = samples()
    data.rows[2]["objects"]["bbox"].reverse()
    data.rows[2]["objects"]["bbox"].append([1, 2, 3, 4])
    with pytest.raises(DataError, match=r"train row .*000002.png: objects.bbox: expected as many numbers"):
        data[2]

    def too_long(row, return_length=False):
        raise ValueError("Current length of row(9) is larger than the max_length(8).")

    with pytest.raises(DataError, match=r"train row .*000000.png: Current length of row\(9\)"):
        replace(data, encode=too_long)[0]
    with pytest.raises(DataError, match="loss weights of its own"):
        replace(data, encode=lambda row, return_length: Encoder()(row) | {"loss_scale": [1.0]})[0]


# Checks before the first step


def test_the_contract_of_the_model_folder_is_kept(tmp_path):
    tokenizer = template().tokenizer
    assert contract_of(tmp_path, tokenizer, None).source == "the default"
    manifest = CheckpointManifest(
        convention="norm999", num_bins=1000, coord_start=vocab().start, order="sorted", prompt="Point.", min_pixels=1, max_pixels=2
    )
    (tmp_path / CHECKPOINT_MANIFEST).write_text(manifest.text())
    found = contract_of(tmp_path, tokenizer, None)
    assert (found.vocab, found.codec, found.source) == (vocab(), CODEC, CHECKPOINT_MANIFEST)
    with pytest.raises(ConfigError, match=r"codec.convention: the checkpoint was trained with 'norm999'"):
        contract_of(tmp_path, tokenizer, "floor1000")
    facts = [look_at_rows("train", [swift_row(records()[0], CODEC, SwiftExportOptions(prompt="Where?"), records()[0].image)[0]], CODEC)]
    with pytest.raises(ConfigError, match=r"--prompt`\): the checkpoint was trained with 'Point.'"):
        check_prompts(tmp_path, facts)
    asking = SwiftExportOptions(prompt="Find {phrase}!", geometry="point_2d")
    rows = [swift_row(replace(records()[0], metadata={"phrase": phrase}), CODEC, asking, records()[0].image)[0] for phrase in ("a\nb", "c")]
    facts = [look_at_rows("train", rows, CODEC)]
    assert (facts[0].prompts, facts[0].geometries) == (("Find a\nb!", "Find c!"), {"point_2d"})
    with pytest.raises(ConfigError, match=r"the checkpoint was trained with 'Point\."):
        check_prompts(tmp_path, facts)
    (tmp_path / CHECKPOINT_MANIFEST).write_text(replace(manifest, prompt="Find {phrase}!").text())
    assert check_prompts(tmp_path, facts) == "Find {phrase}!"
    assert check_prompts(tmp_path / "none", facts) is None
    (tmp_path / CHECKPOINT_MANIFEST).write_text(replace(manifest, coord_start=7).text())
    with pytest.raises(VocabError, match=r"codec.coord_start: 7, but the tokenizer has"):
        contract_of(tmp_path, tokenizer, None)


def test_a_tokenizer_without_the_coordinates_is_refused(tmp_path):
    from coordexp.modeling.load import load_tokenizer

    with pytest.raises(VocabError, match="0 of 1000 coordinate tokens"):
        contract_of(tmp_path, load_tokenizer(workspace() / "tiny"), None)


class Bag:
    def __init__(self, **values):
        self.__dict__.update(values)


def test_arguments_that_would_change_the_loss_are_refused_all_at_once():
    fine = {
        "label_smoothing_factor": 0.0, "enable_dft_loss": False, "enable_channel_loss": False, "use_liger_kernel": False,
        "predict_with_generate": False, "eval_metric": None, "tuner_backend": "peft", "router_aux_loss_coef": 0.0, "n_gpu": 1,
    }  # fmt: skip
    model = Bag(model_info=Bag(is_moe_model=True))
    plain = {"packing": False, "padding_free": False, "sequence_parallel_size": 1}
    refuse_arguments(Bag(**fine), Bag(**plain), model)
    bad = {
        "label_smoothing_factor": 0.1, "enable_dft_loss": True, "enable_channel_loss": True, "use_liger_kernel": True,
        "predict_with_generate": True, "eval_metric": "acc", "tuner_backend": "unsloth", "router_aux_loss_coef": 0.1, "n_gpu": 2,
    }  # fmt: skip
    for key, value in bad.items():
        with pytest.raises(ConfigError) as caught:
            refuse_arguments(Bag(**(fine | {key: value})), Bag(**plain), model)
        assert len(caught.value.problems) == 1
        assert ("--" + key in caught.value.problems[0]) or key == "n_gpu"
    with pytest.raises(ConfigError) as caught:
        refuse_arguments(Bag(**bad), Bag(packing=True, padding_free=True, sequence_parallel_size=2), model)
    assert len(caught.value.problems) == len(bad) + 2
