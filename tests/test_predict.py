"""``coordexp predict``: what a row holds, resuming, several processes, damaged images, saved distributions."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from coordexp import distribution
from coordexp.data.collate import collate_prompts
from coordexp.data.records import read_records
from coordexp.decode.automaton import AnswerGrammar
from coordexp.decode.constraints import Follower
from coordexp.decode.distributions import write_distributions
from coordexp.decode.generate import Generator
from coordexp.decode.output import Output, Workers
from coordexp.decode.predict import predict, questions_sha256, read_values, settings_of
from coordexp.errors import ConfigError, DataError
from coordexp.evaluate.distributions import read_distributions
from coordexp.evaluate.predictions import read_predictions
from coordexp.evaluate.registry import READOUT_NAMES
from coordexp.grammar import Instance, render
from predicting import OPTIONS, TRAIN, model, rows, run, whole
from tiny import records, template, vocab, workspace


def _answer(record):
    example = template().encode(record)
    return [i for i, role in zip(example.input_ids, example.roles, strict=True) if role]


@pytest.mark.parametrize("constrained", [True, False])
def test_a_model_that_knows_the_answer_writes_the_training_tokens(constrained):
    chat, known = template(), records("train")[:2]
    grammar = AnswerGrammar(chat.tokenizer, vocab()) if constrained else None
    generator = Generator(model=model(), tokenizer=chat.tokenizer, vocab=vocab(), grammar=grammar, max_new_tokens=130)
    found = generator([chat.encode_prompt(record) for record in known])
    assert [[*a.token_ids, chat.tokenizer.eos_token_id] for a in found] == [_answer(record) for record in known]
    assert [a.stopped for a in found] == [None, None]
    assert all((a.passes < len(a.token_ids)) == constrained for a in found)


def test_its_rows_hold_the_true_boxes_within_the_grid():
    known = records("train")[:2]
    for record, row in zip(known, rows(whole()[0])[:2], strict=True):
        instances, _ = template().instances(record)
        assert [item["desc"] for item in row["objects"]] == [i.desc for i in instances]
        for item, instance in zip(row["objects"], instances, strict=True):
            side = [record.width, record.height] * 2
            assert item["readouts"]["argmax"] == [k / 999 * s for k, s in zip(instance.bins, side, strict=True)]
            assert item["bbox_2d"] == item["readouts"]["auto"]
        assert (row["problems"], row["error"], row["truncated"], row["stopped"]) == ({}, None, False, None)
        assert row["num_tokens"] == len(_answer(record)) - 1


def _forward(record, ids):
    """Log-probabilities ``[len(ids), V]`` of one whole pass, no cache and no batch."""
    chat = template()
    prompt = chat.encode_prompt(record)
    batch = collate_prompts(
        [replace(prompt, input_ids=prompt.input_ids + ids)], pad_token_id=0, image_token_id=model().config.image_token_id
    )
    with torch.no_grad():
        logits = model()(**batch).logits[0, len(prompt.input_ids) - 1 : -1]
    return logits.double()


@pytest.mark.parametrize("score", ["token", "distribution", "constant"])
def test_scores_are_those_of_one_plain_pass_over_the_written_answer(tmp_path, score):
    run(tmp_path / "p", replace(OPTIONS, score=score, readout="argmax"), count=3)
    checked = 0
    for record, row in zip(records("train")[:3], rows(tmp_path / "p"), strict=True):
        assert row["score_source"] == score
        chat, space = template(), vocab()
        side = [record.width, record.height] * 2
        written = [[round(v / s * 999) for v, s in zip(item["readouts"]["argmax"], side, strict=True)] for item in row["objects"]]
        rendered = render([Instance(item["desc"], tuple(bins)) for item, bins in zip(row["objects"], written, strict=True)])
        encoded = chat.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        logits = _forward(record, ids)
        log_p = logits.log_softmax(-1)
        forced = _forced(ids)
        descs = [span for span in rendered.spans if span.role == "desc"]
        places = [n for n, token in enumerate(ids) if token in space.ids]
        for k, item in enumerate(row["objects"]):
            name = [
                float(log_p[n, ids[n]])
                for n, (start, end) in enumerate(encoded["offset_mapping"])
                if start < descs[k].end and end > descs[k].start and not forced[n]
            ]
            here = places[4 * k : 4 * k + 4]
            values = [float(log_p[n, ids[n]]) for n in here]
            if score == "constant":
                expected = 1.0
            elif score == "token":
                expected = math.exp((sum(name) + sum(values)) / (len(name) + 4))
            else:
                p = logits[here, space.start : space.start + 1000].softmax(-1)
                near = [float(p[j, max(0, b - 16) : b + 17].sum()) for j, b in enumerate(written[k])]
                expected = math.prod(near) * math.exp(sum(name))
            assert item["score"] == pytest.approx(expected, rel=1e-3)
            checked += 1
    assert checked >= 4


def _forced(ids):
    chat = template()
    follower = Follower(AnswerGrammar(chat.tokenizer, vocab()), max_objects=100, max_tokens=130)
    found = []
    for token in ids:
        found.append(follower.forced() is not None)
        follower.advance(token)
    return found


def test_no_scores_are_written_with_none_and_the_reader_takes_the_rows(tmp_path):
    run(tmp_path / "p", replace(OPTIONS, score="none"), count=2)
    assert all("score" not in item for row in rows(tmp_path / "p") for item in row["objects"])
    assert [r.score_source for r in read_predictions(tmp_path / "p")] == [None, None]
    assert set(rows(tmp_path / "p")[0]["objects"][0]["readouts"]) == set(READOUT_NAMES)


def test_edges_that_cross_after_refinement_fall_back_to_the_written_bins_and_are_counted():
    p = torch.full((4, 1000), 1e-9, dtype=torch.float64)
    # x1 written at 400, x2 at 500; the mean of x1 lies at 640, beyond x2.
    for slot, peaks in enumerate([{400: 0.6, 1000 - 1: 0.4}, {10: 1.0}, {500: 1.0}, {20: 1.0}]):
        for k, mass in peaks.items():
            p[slot, k] = mass
    p = p / p.sum(-1, keepdim=True)
    found, back = read_values(p, (400, 10, 500, 20), ordered=True)
    assert found["expectation"] == pytest.approx([400, 10, 500, 20], abs=1e-3)
    assert (back["expectation"], back["argmax"]) == (1, 0)
    free, none = read_values(p, (400, 10, 500, 20), ordered=False)
    assert free["expectation"][0] == pytest.approx(float(distribution.expectation(p)[0]))
    assert free["expectation"][0] > free["expectation"][2]
    assert set(none.values()) == {0}


# Resuming


class _Killed(BaseException):
    pass


def _kill_after(images):
    def progress(done, total, boxes):
        if done >= images:
            raise _Killed

    return progress


@pytest.mark.parametrize("torn", [b"", b'{"image_id": "', None], ids=["between batches", "in a line", "in the second line of a batch"])
def test_a_killed_prediction_goes_on_and_ends_as_an_uninterrupted_one(tmp_path, torn):
    reference, expected = whole()
    options = replace(OPTIONS, save_distributions=True)
    out = tmp_path / "p.jsonl"
    with pytest.raises(_Killed):
        run(out, options, progress=_kill_after(2))
    assert not out.exists()
    part = tmp_path / "p.jsonl.part-0-of-1"
    finished = part.read_bytes()
    assert finished == b"".join(expected.splitlines(keepends=True)[:2])
    with part.open("ab") as file:
        # What a machine that lost power in the middle of the next batch may leave.
        file.write(torn if torn is not None else expected.splitlines(keepends=True)[2] + b'{"image')
    before = part.stat().st_ino
    seen = []
    done = run(
        out, options, progress=lambda images, total, boxes: seen.append((images, part.stat().st_ino, part.read_bytes()[: len(finished)]))
    )
    assert seen == [(4, before, finished), (5, before, finished)]
    assert (done.resumed, done.images, done.finished) == (2, 3, False)
    assert out.read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "p.jsonl.distributions", "p.jsonl.settings.json"]
    for name in ("00000000.npz", "00000002.npz", "00000004.npz"):
        mine, other = ((root.with_name("p.jsonl.distributions") / name).read_bytes() for root in (out, reference))
        assert mine == other


def test_a_smaller_batch_goes_on_after_the_last_finished_row(tmp_path):
    out, options = tmp_path / "p.jsonl", replace(OPTIONS, batch_size=3, save_distributions=True)
    with pytest.raises(_Killed):
        run(out, options, progress=_kill_after(3))
    # Killed after the distributions of a batch were written and before its rows were.
    shutil.copy(tmp_path / "p.jsonl.distributions" / "00000000.npz", tmp_path / "p.jsonl.distributions" / "00000003.npz")
    done = run(out, replace(options, batch_size=1))
    assert (done.resumed, done.images) == (3, 2)
    assert [row["image_id"] for row in rows(out)] == [r.image_id for r in records("train")[:5]]
    assert [item.image_id for item in read_distributions(tmp_path / "p.jsonl.distributions")] == [row["image_id"] for row in rows(out)]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"readout": "argmax"}, "readout"), ({"score": "token"}, "score"), ({"constrained": False}, "constrained"),
        ({"max_new_tokens": 131}, "max_new_tokens"), ({"max_objects": 3}, "max_objects"), ({"temperature": 0.5}, "temperature"),
        ({"seed": 1}, "seed"), ({"save_distributions": True}, "save_distributions"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("complete", [True, False])
def test_a_file_begun_with_other_settings_is_refused_and_left_as_it_is(tmp_path, change, word, complete):
    out = tmp_path / "p.jsonl"
    Output(out, Workers()).prepare(_settings(OPTIONS), overwrite=False)
    target = out if complete else tmp_path / "p.jsonl.part-0-of-1"
    target.write_bytes(b"".join(whole()[1].splitlines(keepends=True)[:2]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=rf"begun with other settings \({word}: .* there, .* here\)"):
        run(out, replace(OPTIONS, **change))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_that_another_prediction_is_writing_is_refused_even_with_overwrite(tmp_path, overwrite):
    out = tmp_path / "p.jsonl"
    Output(out, Workers()).prepare(_settings(OPTIONS), overwrite=False)
    with Output(out, Workers()).alone(), pytest.raises(ConfigError, match="is being written by another prediction"):
        run(out, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl.settings.json"]
    run(out)
    assert [row["image_id"] for row in rows(out)] == [r.image_id for r in records("train")[:5]]


def _settings(options):
    asked = {"geometries": ["bbox_2d"], "questions_sha256": questions_sha256(template(), records("train")[:5])}
    return settings_of(records("train")[:5], options, asked, None, Workers())


def test_other_records_another_model_and_other_processes_are_other_settings(tmp_path):
    out = tmp_path / "p.jsonl"
    Output(out, Workers()).prepare(_settings(OPTIONS) | {"model_sha256": {"model.safetensors": "a"}}, overwrite=False)
    with pytest.raises(ConfigError, match="model_sha256"):
        run(out, settings={"model_sha256": {"model.safetensors": "b"}})
    with pytest.raises(ConfigError, match="images: 5 there, 4 here"):
        run(out, count=4, settings={"model_sha256": {"model.safetensors": "a"}})
    with pytest.raises(ConfigError, match="processes: 1 there, 2 here"):
        Output(out, Workers(0, 2)).prepare(
            _settings(OPTIONS) | {"model_sha256": {"model.safetensors": "a"}, "processes": 2}, overwrite=False
        )


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.part-0-of-1"])
def test_a_file_whose_settings_are_unknown_is_refused_and_overwrite_replaces_it_if_it_holds_predictions(tmp_path, name):
    for content, overwrite, word in (
        (b"mine\n", False, r"exists without p\.jsonl\.settings\.json"), (b"mine\n", True, "not written by coordexp predict"),
        (TRAIN.read_bytes(), True, "not written by coordexp predict"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=word):
            run(tmp_path / "p.jsonl", count=1, overwrite=overwrite)
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / name).write_bytes(whole()[1])
    run(tmp_path / "p.jsonl", count=1, overwrite=True)
    assert len(rows(tmp_path / "p.jsonl")) == 1


def test_a_part_with_other_rows_is_an_error(tmp_path):
    out = tmp_path / "p.jsonl"
    Output(out, Workers()).prepare(_settings(OPTIONS), overwrite=False)
    part = tmp_path / "p.jsonl.part-0-of-1"
    lines = whole()[1].splitlines(keepends=True)
    for content, where in ((lines[1] + lines[0], ":1: "), (lines[0] + b"\xff\n", ":2: "), (b"".join(lines) + lines[0], ":6: ")):
        part.write_bytes(content)
        with pytest.raises(DataError, match=where):
            run(out)


# Images, distributions


def test_a_damaged_or_missing_image_is_a_row_with_its_error_and_the_others_are_as_ever(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(workspace() / "data", folder)
    made = read_records(folder / "train.jsonl", check_images=False).records[:5]
    made[1].image.write_bytes(made[1].image.read_bytes()[:100])
    made[2].image.unlink()
    found = predict(model(), template(), made, tmp_path / "p", vocab=vocab(), options=OPTIONS)
    assert found.failed == 2
    expected = rows(whole()[0])
    for n, row in enumerate(rows(tmp_path / "p")):
        if n in (1, 2):
            assert made[n].image.name in row["error"]
            assert "\n" not in row["error"]
            assert (row["objects"], row["num_tokens"], row["score_source"]) == ([], None, None)
        else:
            assert row["error"] is None
            assert [item["desc"] for item in row["objects"]] == [item["desc"] for item in expected[n]["objects"]]
    read = read_predictions(tmp_path / "p")
    assert [r.error is None for r in read] == [True, False, False, True, True]


def test_saved_distributions_are_those_that_the_boxes_were_read_from():
    out, _ = whole()
    found = list(read_distributions(out.with_name("p.jsonl.distributions")))
    assert [item.image_id for item in found] == [row["image_id"] for row in rows(out)]
    boxes = 0
    for item, row in zip(found, rows(out), strict=True):
        all_probs, rest = item.dense()
        assert all_probs.shape == (len(row["objects"]), 4, 1000)
        np.testing.assert_allclose(all_probs.sum(-1) + rest, 1, atol=2e-3)
        for probs, thing in zip(all_probs, row["objects"], strict=True):
            boxes += 1
            p = torch.from_numpy(probs)
            p = p / p.sum(-1, keepdim=True)
            side = np.array([row["width"], row["height"]] * 2)
            bins = [round(v / s * 999) for v, s in zip(thing["readouts"]["argmax"], side, strict=True)]
            expected, _ = read_values(p, bins, ordered=True)
            np.testing.assert_allclose(np.array(expected["median"]) / 999 * side, thing["readouts"]["median"], atol=0.2)
    assert boxes >= 4


def test_distributions_survive_the_disk_to_half_precision_and_say_what_they_left_out(tmp_path):
    random = torch.Generator().manual_seed(3)
    p = torch.softmax(torch.randn(3, 4, 50, generator=random, dtype=torch.float64) * 4, -1)
    write_distributions(tmp_path, 7, [("a", [p[0], p[1]]), ("b", []), ("c", [p[2]])], num_bins=50)
    a, b, c = read_distributions(tmp_path)
    assert [x.image_id for x in (a, b, c)] == ["a", "b", "c"]
    assert b.dense()[0].shape == (0, 4, 50)
    for found, true in ((a.dense()[0], p[:2]), (c.dense()[0], p[2:])):
        kept = torch.where(true >= 1e-4, true, 0.0)
        np.testing.assert_allclose(found, kept.numpy(), rtol=1e-3, atol=0)
    np.testing.assert_allclose(a.dense()[1], torch.where(p[:2] < 1e-4, p[:2], 0.0).sum(-1).numpy(), atol=1e-6)
    assert 0 < (p < 1e-4).sum() < p.numel()
    (tmp_path / "00000009.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"00000009\.npz"):
        list(read_distributions(tmp_path))
    shutil.copy(tmp_path / "00000007.npz", tmp_path / "00000009.npz")
    with pytest.raises(DataError, match="'a' is in an earlier file"):
        list(read_distributions(tmp_path))
    with pytest.raises(DataError, match="found no"):
        list(read_distributions(tmp_path / "nowhere"))


def test_sampling_depends_on_the_seed_and_not_on_the_batch(tmp_path):
    made = {}
    for seed, size in ((0, 1), (0, 2), (1, 2)):
        out = tmp_path / f"{seed}-{size}"
        run(out, replace(OPTIONS, temperature=2.0, seed=seed, batch_size=size), count=3)
        made[seed, size] = [[(i["desc"], i["readouts"]["argmax"]) for i in row["objects"]] for row in rows(out)]
    assert made[0, 1] == made[0, 2]
    assert made[0, 2] != made[1, 2]
