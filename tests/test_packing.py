"""Packing: every sample once, no pack too long, no sample that sees another, and a refusal where one does."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from command import call
from coordexp.config.load import load_config
from coordexp.data.dataset import RecordDataset
from coordexp.data.options import PackingOptions, SynthOptions
from coordexp.data.packed import data_digest, plan_dataset, template_digest
from coordexp.data.packing import FILLER, PackSchedule, plan_packs
from coordexp.data.records import read_records
from coordexp.data.synthetic import write_scenes
from coordexp.data.template import ChatTemplate
from coordexp.decode.generate import generate
from coordexp.errors import ConfigError, DataError
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.extend import extend_model
from coordexp.modeling.load import load_image_processor, load_tokenizer
from coordexp.modeling.positions import RopeIndex
from coordexp.modeling.tiny import write_tiny_model
from coordexp.train.forward import bind_coord_loss, coord_loss
from coordexp.train.packing import refuse_leaks
from packs import pack_collator, packed, qwen25_model
from tiny import collator, fresh_model, records, template, vocab, workspace

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


def _plan(lengths, length=60, seed=0, on_overlong="drop", **inputs):
    return plan_packs(
        lengths, length=length, seed=seed, on_overlong=on_overlong, names=[f"f:{i}" for i in range(len(lengths))], inputs=inputs
    )


def _slow_best_fit(lengths, order, length):
    """Best fit by looking at every pack: the tightest that takes the sample; returns the sorted sums."""
    packs = []
    for i in order:
        fits = [p for p in packs if sum(p) + lengths[i] <= length]
        target = max(fits, key=sum, default=None)
        if target is None:
            packs.append(target := [])
        target.append(lengths[i])
    return sorted(map(sum, packs))


@given(LENGTHS, st.integers(30, 100), st.integers(0, 5))
def test_every_sample_is_in_one_pack_or_counted_as_dropped_and_no_pack_is_over_length(lengths, length, seed):
    fitting = [i for i, n in enumerate(lengths) if n <= length]
    if not fitting:
        with pytest.raises(DataError):
            _plan(lengths, length, seed)
        return
    plan = _plan(lengths, length, seed)
    assert sorted(i for pack in plan.packs for i in pack) == fitting
    assert sorted([*fitting, *plan.dropped]) == list(range(len(lengths)))
    assert all(pack and sum(lengths[i] for i in pack) <= length for pack in plan.packs)
    assert plan.tokens == sum(lengths[i] for i in fitting)
    assert plan.fill == pytest.approx(plan.tokens / length / len(plan.packs))
    assert plan == _plan(lengths, length, seed)


@given(LENGTHS)
def test_the_plan_is_best_fit_decreasing(lengths):
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    got = sorted(sum(lengths[i] for i in pack) for pack in _plan(lengths).packs)
    assert got == _slow_best_fit(lengths, order, 60)


@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.sampled_from(["drop", "pad"]), st.integers(0, 3))
def test_ranks_get_equally_many_batches_and_together_every_pack_once(lengths, ranks, batch, accumulate, tail, epoch):
    plan = _plan(lengths)
    packs, window = len(plan.packs), ranks * batch * accumulate
    if tail == "drop" and packs < window:
        with pytest.raises(ConfigError, match=r"data\.packing\.tail"):
            PackSchedule(plan, ranks, batch, accumulate, tail)
        return
    schedule = PackSchedule(plan, ranks, batch, accumulate, tail)
    shards = [schedule.shard(epoch, rank) for rank in range(ranks)]
    assert len({len(shard) for shard in shards}) == 1
    assert math.ceil(len(shards[0]) / accumulate) == schedule.steps
    seen = [number for shard in shards for micro in shard for number in micro]
    real = [number for number in seen if number != FILLER]
    assert len(real) == len(set(real)) == packs - schedule.left_out
    assert len(seen) == schedule.slots
    assert schedule.left_out == (packs % window if tail == "drop" else 0)
    assert len(seen) - len(real) < ranks * batch
    order = schedule.order(epoch)
    assert order == schedule.order(epoch)
    sampler = BatchSampler(SequentialSampler(range(len(order))), batch, drop_last=False)
    for rank, shard in enumerate(shards if ranks > 1 else []):
        theirs = list(BatchSamplerShard(sampler, num_processes=ranks, process_index=rank))
        assert [tuple(order[i] for i in micro) for micro in theirs] == list(shard)


def test_epochs_draw_other_orders_and_drop_other_packs():
    schedule = PackSchedule(_plan([60] * 21), accumulate=4, tail="drop")
    orders = [schedule.order(epoch) for epoch in range(20)]
    assert len(set(orders)) == 20
    assert len({number for order in orders for number in range(21) if number not in order}) > 5
    assert PackSchedule(schedule.plan, shuffle=False).order(3) == tuple(range(21))


@settings(max_examples=30)
@given(st.sampled_from(["length", "seed", "on_overlong", "data", "tokenizer", "template", "order", "sample_lengths"]))
def test_the_fingerprint_changes_with_each_of_its_inputs(changed):
    base = {"length": 60, "seed": 0, "on_overlong": "drop", "data": "a", "tokenizer": "b", "template": "c", "order": "sorted"}
    other = {"length": 61, "seed": 1, "on_overlong": "error"}.get(changed, "z")
    lengths = [5, 6, 7]
    new = _plan([5, 7, 6], **base) if changed == "sample_lengths" else _plan(lengths, **{**base, changed: other})
    assert new.fingerprint != _plan(lengths, **base).fingerprint == _plan(lengths, **base).fingerprint


def test_a_data_sets_fingerprint_sees_data_tokenizer_template_order_and_seed():
    samples, options = RecordDataset(records(), template()), PackingOptions(enabled=True, length=400)
    base = plan_dataset(samples, options, seed=0).fingerprint
    tokenizer = type(template().tokenizer).from_pretrained(workspace() / "model")
    assert plan_dataset(RecordDataset(records(), dataclasses.replace(template(), tokenizer=tokenizer)), options, seed=0).fingerprint == base
    tokenizer.add_tokens(["<new>"])
    first = records()[0]
    moved = dataclasses.replace(first, objects=(dataclasses.replace(first.objects[0], values=(1.0, 2.0, 3.0, 4.5)), *first.objects[1:]))
    others = [
        RecordDataset([moved, *records()[1:]], template()),
        RecordDataset(records(), dataclasses.replace(template(), tokenizer=tokenizer)),
        RecordDataset(records(), dataclasses.replace(template(), prompt="Find every object.")),
        RecordDataset(records(), dataclasses.replace(template(), order="random")),
    ]
    prints = {base, plan_dataset(samples, options, seed=1).fingerprint}
    prints |= {plan_dataset(other, options, seed=0).fingerprint for other in others}
    assert len(prints) == 6
    assert data_digest([moved]) != data_digest([first])
    assert template_digest(others[2].template) != template_digest(template())


def test_an_over_long_sample_is_an_error_that_names_file_line_and_the_way_out():
    with pytest.raises(
        DataError, match=r"^f:1: sample of 70 tokens, data\.packing\.length is 60 \(2 samples .* longest has 80\)"
    ) as caught:
        _plan([5, 70, 80], on_overlong="error")
    assert "data.packing.on_overlong=drop" in str(caught.value)
    assert "80 or more" in str(caught.value)
    assert _plan([5, 70, 80]).dropped == (1, 2)


def test_planned_lengths_are_those_of_the_tokenised_samples_at_any_image_size(tmp_path):
    for side in (40, 72, 97):
        write_scenes(tmp_path / str(side), SynthOptions(train=6, val=1, test=1, side=side, seed=1))
        some = read_records(tmp_path / str(side) / "train.jsonl").records
        samples = RecordDataset(some, template())
        assert samples.token_counts() == [len(samples[i].input_ids) for i in range(len(some))]


def test_demo_scenes_fill_packs_to_98_percent(tmp_path):
    """The demo's model and scene settings; the lengths of 400 scenes stand for its 12,000."""
    demo = load_config(Path(__file__).parents[1] / "experiments" / "demo.yaml")
    write_scenes(tmp_path / "data", dataclasses.replace(demo.data.synth, train=400, val=1, test=1))
    folder = extend_model(write_tiny_model(tmp_path / "tiny", demo.model.tiny), tmp_path / "model", demo.vocab).out
    chat = ChatTemplate(load_tokenizer(folder), load_image_processor(folder))
    lengths = RecordDataset(read_records(tmp_path / "data" / "train.jsonl").records, chat).token_counts()
    assert len(set(lengths)) > 2
    for length in (2048, 4096):
        assert _plan(30 * lengths, length=length, on_overlong="error").fill >= 0.98


def test_labels_and_everything_beside_them_stay_in_their_sample():
    data = packed(records())
    packs = [data[0], data[1]]
    batch = pack_collator(fresh_model())(packs)
    assert "attention_mask" not in batch
    assert batch["position_ids"].shape == (4, *batch["input_ids"].shape)
    patches = 0
    for b, pack in enumerate(packs):
        start = 0
        for example in pack.examples:
            n = len(example.input_ids)
            alone = collator()([example])
            for name in ("input_ids", "mm_token_type_ids"):
                assert torch.equal(batch[name][b, start : start + n], alone[name][0])
            for name, column in batch["targets"].columns().items():
                mine = alone["targets"].columns()[name][0]
                torch.testing.assert_close(column[b, start : start + n], mine, rtol=0, atol=0, equal_nan=True)
            assert batch["targets"].labels[b, start + n - 1] == -100
            assert batch["position_ids"][0, b, start : start + n].tolist() == list(range(n))
            p = example.pixel_values.shape[0]
            torch.testing.assert_close(batch["pixel_values"][patches : patches + p], example.pixel_values, rtol=0, atol=0)
            start, patches = start + n, patches + p
        assert (batch["targets"].labels[b, start:] == -100).all()
        assert (batch["mm_token_type_ids"][b, start:] == 0).all()
    assert batch["targets"].image_ids == [e.image_id for pack in packs for e in pack.examples]
    assert batch["image_grid_thw"].shape[0] == len(batch["targets"].image_ids)


@pytest.mark.parametrize("make", [fresh_model, qwen25_model], ids=["Qwen3-VL", "Qwen2.5-VL"])
@pytest.mark.parametrize("single_row", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_equal_unpacked_logits_for_every_sample(make, single_row, attention):
    model = make().eval()
    model.set_attn_implementation(attention)
    data = packed(records())
    packs = [data[i] for i in range(len(data))]
    assert max(len(pack.examples) for pack in packs) >= 3
    batch = pack_collator(model, single_row)(packs)
    names = ("input_ids", "position_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    plain = (*names[:1], "attention_mask", *names[2:])
    with torch.no_grad():
        logits = model(**{k: batch[k] for k in names}, use_cache=False).logits
        row = start = 0
        for pack in packs:
            for example in pack.examples:
                alone = collator()([example])
                expected = model(**{k: alone[k] for k in plain}).logits[0]
                got = logits[row, start : start + expected.shape[0]]
                assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
                start += expected.shape[0]
            row, start = (row, start) if single_row else (row + 1, 0)


def test_generation_is_the_same_before_and_after_a_model_has_run_packs():
    prompts = [template().encode_prompt(r) for r in records("test")]
    model = fresh_model()
    before = generate(model, template().tokenizer, prompts, vocab=vocab(), max_new_tokens=6)
    batch = pack_collator(model)([packed(records())[0]])
    model(**{k: batch[k] for k in ("input_ids", "position_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")}, use_cache=False)
    after = generate(model, template().tokenizer, prompts, vocab=vocab(), max_new_tokens=6)
    for a, b in zip(after, before, strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(a.coord_logits, b.coord_logits, rtol=0, atol=0)


def test_the_rotary_rule_travels_without_the_models_weights():
    for model in (fresh_model(), qwen25_model()):
        rule = pickle.loads(pickle.dumps(RopeIndex.of(model)))
        batch = collator()([template().encode(records()[0])])
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        expected, _ = model.model.get_rope_index(**{k: batch[k] for k in names})
        assert torch.equal(rule(*(batch[k] for k in names)), expected)
        assert len(pickle.dumps(rule)) < 50_000


def test_packing_refuses_an_architecture_it_does_not_know():
    with pytest.raises(ConfigError, match=r"Qwen3-VL and Qwen2\.5-VL, not Linear: set data\.packing\.enabled=false"):
        RopeIndex.of(torch.nn.Linear(2, 2))


def _probe(model, packed_collator, run=None):
    bind_coord_loss(model, vocab=vocab(), objective=CoordObjective())
    run = run or (lambda batch: coord_loss(model, batch))
    return refuse_leaks(
        packed(records()), model=model, run=run, collate=collator(), packed=packed_collator, attention="sdpa", dtype=torch.float32
    )


@pytest.mark.parametrize("make", [fresh_model, qwen25_model], ids=["Qwen3-VL", "Qwen2.5-VL"])
def test_the_probe_passes_what_is_separate_and_leaves_the_model_as_it_was(make):
    model = make().train()
    assert _probe(model, pack_collator(model)) <= 1e-5
    assert model.training
    assert not model.model._forward_hooks


@pytest.mark.parametrize("make", [fresh_model, qwen25_model], ids=["Qwen3-VL", "Qwen2.5-VL"])
@pytest.mark.parametrize("fault", ["three rows", "a mask of ones", "cache", "positions of the whole row"])
def test_the_probe_refuses_every_known_way_to_leak(make, fault):
    model = make()
    good = pack_collator(model)

    def bad(packs):
        batch = good(packs)
        if fault == "three rows":
            batch["position_ids"] = batch["position_ids"][1:]
        elif fault == "a mask of ones":
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        elif fault == "positions of the whole row":
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(4, 1, -1)
        return batch

    if fault == "cache":
        stock = model.model.forward
        model.model.forward = lambda *args, use_cache=None, **inputs: stock(*args, use_cache=True, **inputs)
    with pytest.raises(ConfigError, match=r"model\.attn_implementation=sdpa lets samples .* set model\.attn_implementation=sdpa"):
        _probe(model, bad)


def test_the_probe_refuses_rotary_positions_that_are_not_the_samples_own():
    model = fresh_model()
    good = pack_collator(model)

    def bad(packs):
        batch = good(packs)
        batch["position_ids"][1:] *= 2
        return batch

    with pytest.raises(ConfigError, match="differ by"):
        _probe(model, bad)


SMALL = (
    "data.kind=jsonl", "vocab.extend=false", "data.packing.enabled=true", "train.max_steps=2", "train.per_device_train_batch_size=2",
    "train.logging_steps=1", "train.eval_steps=2", "train.save_steps=2", "train.report_to=[]",
)  # fmt: skip


def _train(tmp_path, monkeypatch, capsys, *words):
    (tmp_path / "x.yaml").write_text(f"data: {{source: {workspace() / 'data'}}}\nmodel: {{path: {workspace() / 'model'}}}\n")
    sets = [word for pair in (*SMALL, *words) for word in ("--set", pair)]
    return call(monkeypatch, capsys, "train", tmp_path / "x.yaml", "--output-dir", tmp_path / "run", *sets)


def test_a_run_trains_and_evaluates_packed_and_writes_its_plan(tmp_path, monkeypatch, capsys):
    words = ("data.packing.length=110", "data.packing.on_overlong=drop", "data.packing.tail=drop")
    code, out, err = _train(tmp_path, monkeypatch, capsys, *words)
    assert code == 0, err
    plan = json.loads((tmp_path / "run" / "packing.json").read_text())
    lengths = [len(template().encode(r).input_ids) for r in records()]
    over = [r.image_id for r, n in zip(records(), lengths, strict=True) if n > 110]
    assert over
    assert plan["train"]["dropped"] == over
    assert f"packing left out {len(over)} train samples over 110 tokens: {over[0]}" in out
    assert "packing probe: " in out
    rows = [json.loads(line) for line in (tmp_path / "run" / "logging.jsonl").read_text().splitlines()]
    assert all(row["pack/num_samples"] >= 2 for row in rows if "loss" in row)
    assert sum("eval_loss" in row for row in rows) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.packing.length=100"], "train.jsonl:"),
        (["data.packing.length=0"], "data.packing.length: expected at least 1"),
        (["data.packing.tail=cut"], "data.packing.tail: expected 'drop' or 'pad'"),
        (["data.packing.tail=drop", "train.gradient_accumulation_steps=50"], "set data.packing.tail=pad"),
        (["train.train_sampling_strategy=group_by_length"], "set train.train_sampling_strategy=random"),
    ],
)
def test_packing_that_cannot_work_is_one_line_at_the_start(tmp_path, monkeypatch, capsys, words, message):
    code, _, err = _train(tmp_path, monkeypatch, capsys, *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1, err
    assert not (tmp_path / "run" / "checkpoints").exists()
