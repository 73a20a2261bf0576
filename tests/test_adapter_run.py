"""Adapters from the command line: train, save, resume, predict from the adapter folder."""

from __future__ import annotations

import json

import pytest
import torch

from adapted import base_model
from command import call
from coordexp.data.dataset import RecordDataset
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.load import copy_processor_files
from coordexp.train.launch import training_arguments
from coordexp.train.options import TrainOptions
from coordexp.train.trainer import CoordTrainer
from coordexp.vocab.adapters import adapt, base_folder
from coordexp.vocab.options import AdapterOptions
from tiny import collator, records, template, vocab, workspace

SMALL = [
    f"data.source={workspace() / 'data'}", f"model.path={workspace() / 'model'}", "data.max_test=2", "train.max_steps=2",
    "train.per_device_train_batch_size=4", "train.logging_steps=1", "train.eval_steps=2", "train.save_steps=2", "train.report_to=[]",
    "decode.max_new_tokens=90", "evaluate.bootstrap=20",
]  # fmt: skip
FLOOR = ["train.lr_scheduler_type=cosine_with_min_lr", "train.lr_scheduler_kwargs={min_lr_rate: 0.1}"]


def _run(tmp_path, monkeypatch, capsys, *sets, command="run"):
    experiment = tmp_path / "small.yaml"
    experiment.write_text("data: {kind: jsonl, source: none}\nvocab: {extend: false}\n")
    words = [word for pair in (*SMALL, *sets) for word in ("--set", pair)]
    return call(monkeypatch, capsys, command, experiment, "--output-dir", tmp_path / "run", *words)


@pytest.mark.parametrize("kind", ["lora", "rows"])
def test_a_run_trains_an_adapter_and_predicts_from_its_folder(kind, tmp_path, monkeypatch, capsys):
    code, out, err = _run(tmp_path, monkeypatch, capsys, f"adapter.kind={kind}", "train.lr_coord_rows=1e-3", *FLOOR)
    assert code == 0, err
    assert "coordinate rows: 48,000 of 48,000 parameters, learning rate 0.001" in out
    assert f"adapter: {'lora of rank 16' if kind == 'lora' else 'the coordinate rows'}" in out
    run_dir = tmp_path / "run"
    final = run_dir / "checkpoints" / "final"
    assert (final / "adapter_model.safetensors").is_file()
    assert not (final / "model.safetensors").exists()
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str((tmp_path / "run" / "model").resolve())
    assert json.loads((run_dir / "results.json").read_text())["counts"]["effective"] == 2

    test, again = run_dir / "data" / "test.jsonl", tmp_path / "again.jsonl"
    words = ("predict", final, test, "--out", again, "--limit", 2, "--max-new-tokens", 90)
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 0, err
    assert again.read_text() == (run_dir / "predictions.jsonl").read_text()

    config = json.loads((final / "adapter_config.json").read_text())
    (final / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    again.unlink()
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2
    assert err.count("\n") == 1
    assert "base_model_name_or_path: there is no folder elsewhere" in err
    assert not again.exists()


def test_training_goes_on_from_an_adapter_folder_on_a_whole_model_of_its_own(tmp_path, monkeypatch, capsys):
    adapter = tmp_path / "adapter"
    adapt(base_model(), AdapterOptions(kind="rows"), vocab(), base=workspace() / "model").save_pretrained(adapter)
    template().tokenizer.save_pretrained(adapter)
    copy_processor_files(workspace() / "model", adapter)
    code, _, err = _run(tmp_path, monkeypatch, capsys, f"model.path={adapter}", "adapter.kind=rows", command="train")
    assert code == 0, err
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    final = tmp_path / "run" / "checkpoints" / "final"
    assert base_folder(final) == (tmp_path / "run" / "model").resolve()


def test_a_target_that_matches_nothing_stops_a_run_before_it_writes(tmp_path, monkeypatch, capsys):
    code, _, err = _run(tmp_path, monkeypatch, capsys, "adapter.kind=lora", "adapter.targets=[q_prj]")
    assert code == 2
    assert err.count("\n") == 1
    assert "adapter.targets: q_prj" in err
    assert "q_proj" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
@pytest.mark.parametrize("kind", ["dora", "rows"])
def test_an_interrupted_adapter_run_resumes_to_the_same_weights(kind, tmp_path):
    def trainer(steps):
        torch.manual_seed(0)
        options = TrainOptions(
            max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0, lr_scheduler_type="constant_with_warmup",
            logging_steps=1, eval_steps=10, save_steps=2, save_total_limit=None, report_to=(),
        )  # fmt: skip
        return CoordTrainer(
            model=adapt(base_model(), AdapterOptions(kind=kind, dropout=0.1), vocab(), base=workspace() / "model"),
            objective=CoordObjective(),
            vocab=vocab(),
            args=training_arguments(options, tmp_path / "out", seed=0),
            train_dataset=RecordDataset(records()[:8], template()),
            eval_dataset=RecordDataset(records()[:2], template()),
            data_collator=collator(),
        )

    whole = trainer(4)
    whole.train()
    rest = trainer(4)
    rest.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert rest.state.global_step == 4
    expected = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    for name, parameter in rest.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)
