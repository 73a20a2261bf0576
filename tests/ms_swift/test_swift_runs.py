"""The real command ``swift sft``, on CPU and offline: what its log says, with the plugin and without, on one process and on two."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml

from command import call
from coordexp.modeling.load import load_image_processor, load_model, load_tokenizer
from coordexp.modeling.manifest import read_checkpoint_manifest
from coordexp.train import registry
from coordexp.train.options import TokenTypeMetrics
from sft import data, environment, rows, start

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]

OBJECTIVE = {"sigma": 4.0, "w1": 0.01, "crps": 0.1, "text_gate": 0.2}
STEPS = 8
# Every step of these takes all 16 samples; so the loss of step n + 1 is the loss of the set under the weights after step n,
# which is what the evaluation after step n says.
WINDOWS = {
    "ga1": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 16},
    "ga8": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "save_strategy": "steps", "save_steps": STEPS},
    "ranks": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "per_device_eval_batch_size": 5,
        "use_cpu": "true",
        "ddp_backend": "gloo",
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs, two at a time; they are read by name."""
    folder = tmp_path_factory.mktemp("runs")
    waiting = {
        name: {"evaluate": data() / "train.jsonl", "max_steps": STEPS, "callbacks": "first_gradient", **window}
        for name, window in WINDOWS.items()
    }
    plain = {"loss": False, "max_steps": 2, "callbacks": "first_gradient"}
    waiting |= {"stock": {"plugin": False, **plain}, "unchosen": {"plugin": True, **plain}}
    started = {}
    for name, changes in waiting.items():
        while sum(process.poll() is None for process in started.values()) >= 2:
            next(p for p in started.values() if p.poll() is None).wait(timeout=300)
        extra = {"NPROC_PER_NODE": "2"} if name == "ranks" else {}
        environ = environment(OBJECTIVE, folder) | extra | {"GRADIENT_OUT": str(folder / f"{name}.pt")}
        started[name] = start(folder / name, environ=environ, whole=name in ("ga8", "ranks"), **changes)
    for name, process in started.items():
        assert process.wait(timeout=300) == 0, (folder / f"{name}.log").read_text()[-3000:]
    return folder


def test_train_loss_of_a_window_equals_the_evaluation_loss_at_any_accumulation(runs):
    for name in WINDOWS:
        train, evaluation = rows(runs / name)
        assert len(train) == len(evaluation) == STEPS
        for after, before in zip(train[1:], evaluation[:-1], strict=True):
            # The log keeps eight digits.
            assert after["loss"] / before["eval_loss"] == pytest.approx(1.0, abs=2e-6), name
            for key in ("coord_softce_w1/soft_ce", "coord_dist/crps", "token_acc", "coord_softce_w1/coord_tokens"):
                assert after[key] == pytest.approx(before[f"eval_{key}"], rel=1e-5, abs=1e-6), (name, key)


@pytest.mark.parametrize("name", ["ga8", "ranks"])
def test_accumulation_and_ranks_change_no_gradient_and_no_logged_value(runs, name):
    one, other = torch.load(runs / "ga1.pt"), torch.load(runs / f"{name}.pt")
    assert one.keys() == other.keys()
    a, b = (torch.cat([grads[key].flatten() for key in one]) for grads in (one, other))
    assert (a - b).norm() <= 1e-5 * a.norm()
    for first, second in zip(rows(runs / "ga1"), rows(runs / name), strict=True):
        # Later steps follow from weights whose rounding AdamW may have blown up.
        for x, y in zip(first[:2], second[:2], strict=True):
            for key in x.keys() - {"accum/grad_steps", "accum/current_grad_steps"}:
                equal = x[key] == y[key] or (math.isnan(x[key]) and math.isnan(y[key]))
                assert equal or x[key] == pytest.approx(y[key], rel=1e-4, abs=1e-6), key


def test_the_registry_has_the_same_names_in_training_and_evaluation(runs):
    names = set(registry.keys(TokenTypeMetrics()))
    train, evaluation = rows(runs / "ga8")
    extra = {
        "grad_norm",
        "learning_rate",
        "epoch",
        "global_step/max_steps",
        "pack/num_samples",
        "accum/grad_steps",
        "accum/current_grad_steps",
    }
    assert set(train[-1]) == names | extra
    assert set(evaluation[-1]) == {f"eval_{name}" for name in names} | {"epoch", "global_step/max_steps"}
    assert train[-1]["pack/num_samples"] == 16
    assert train[-1]["loss"] == pytest.approx(sum(v for k, v in train[-1].items() if k.startswith("contrib/")), rel=1e-6)
    assert train[-1]["loss"] < 0.9 * train[0]["loss"]


@pytest.mark.parametrize("name", ["ga1", "ga8", "ranks"])
def test_the_log_passes_the_audit(runs, name, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "audit", runs / name / "logging.jsonl", "--json")
    found = {rule["code"]: rule for rule in json.loads(out)["rules"]}
    assert (code, err) == (0, "")
    assert not [rule for rule in found.values() if rule["outcome"] == "finding" and rule["severity"] == "severe"]
    # Wrong scale by accumulation, twice divided, by ranks, by a constant; other tokens; values that are no numbers.
    judged = {"CX001", "CX002", "CX004", "CX005", "CX010"} - ({"CX001", "CX002"} if name == "ga1" else set())
    judged |= {"CX003"} if name == "ranks" else set()
    assert {code: found[code]["outcome"] for code in judged} == dict.fromkeys(judged, "passed")


def test_the_banner_says_what_divides_what_and_where_the_centres_come_from(runs):
    said = [line.split("coordexp: ", 1)[1] for line in (runs / "ga8.log").read_text().splitlines() if "] coordexp: " in line]
    assert said[0].endswith("objective.yaml: 1 text_ce + 1 soft_ce + 0.01 w1 + 0.1 crps + 1 gate + 0.2 text_gate")
    assert said[1] == (
        "one step = 2 samples x 8 micro-batches x 1 ranks = 16 samples; text terms divide by text positions, coordinate terms by "
        "coordinate positions, counted over the whole step"
    )
    assert "centres: unrounded, from objects.bbox (32 rows checked)" in said
    assert not [line for line in said if "WARNING" in line]
    ranks = (runs / "ranks.log").read_text()
    assert ranks.count("x 4 micro-batches x 2 ranks = 16 samples") == 1


def test_a_checkpoint_is_one_that_this_package_predicts_with(runs):
    folder = runs / "ga8" / f"checkpoint-{STEPS}"
    manifest = read_checkpoint_manifest(folder)
    assert (manifest.convention, manifest.order, manifest.prompt) == ("norm999", "sorted", "Locate every object.")
    load_image_processor(folder)
    assert load_model(folder).get_input_embeddings().weight.shape[0] >= len(load_tokenizer(folder))


def test_without_the_loss_name_the_command_is_stock_with_the_plugin_and_without(runs):
    assert rows(runs / "stock") == rows(runs / "unchosen")
    train, evaluation = rows(runs / "stock")
    assert set(train[0]) == {"loss", "grad_norm", "learning_rate", "token_acc", "epoch", "global_step/max_steps"}
    assert set(evaluation[0]) == {"eval_loss", "eval_token_acc", "epoch", "global_step/max_steps"}
    a, b = (torch.load(runs / f"{name}.pt") for name in ("stock", "unchosen"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"objective": {"sigm": 4.0}}))
    process = start(tmp_path / "bad", environ=environment() | {"COORDEXP_CONFIG": str(tmp_path / "bad.yaml")})
    assert process.wait(timeout=120) != 0
    lines = (tmp_path / "bad.log").read_text().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [
        "error: bad.yaml: objective.sigm: unknown key: did you mean objective.sigma?"
    ]
    assert "Traceback" not in "".join(lines)
