"""Adapters: what is trained, what the fused loss sees, and what a saved adapter becomes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from adapted import KINDS, STOCK, adapted_model, base_model, batch
from coordexp.data.dataset import RecordDataset
from coordexp.decode.generate import generate
from coordexp.errors import ConfigError
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.load import check_model_folder, load_model
from coordexp.modeling.tiny import tiny_config
from coordexp.train import forward as forward_module
from coordexp.train.forward import bind_coord_loss, coord_loss
from coordexp.train.launch import training_arguments
from coordexp.train.options import TrainOptions
from coordexp.train.trainer import CoordTrainer
from coordexp.vocab.adapters import adapt, head_layers, head_of, part_of, rows_in_place, target_layers
from coordexp.vocab.options import AdapterOptions
from tiny import SMALL, collator, records, template, vocab, workspace

# PEFT's own, where a test calls it directly.
PEFT_NOISE = (
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
)
FAMILIES = [(family, tied) for family in ("qwen3", "qwen25") for tied in (True, False)]
OBJECTIVE = CoordObjective(sigma=3.0)


def _reference(logits, inputs):
    """The default objective by its definition, on full logits."""
    space, labels = vocab(), inputs["targets"].labels
    coord = (labels >= space.start) & (labels < space.start + space.num_bins)
    text = (labels >= 0) & ~coord
    z = logits[coord].double()
    distance = torch.arange(space.num_bins) - inputs["targets"].centers[coord].double()[:, None]
    q = torch.softmax(-0.5 * (distance / OBJECTIVE.sigma) ** 2, -1)
    columns = slice(space.start, space.start + space.num_bins)
    return (
        torch.nn.functional.cross_entropy(logits[text].double(), labels[text])
        - (q * z[:, columns].log_softmax(-1)).sum(-1).mean()
        - torch.logsumexp(z.log_softmax(-1)[:, columns], -1).mean()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_loss_and_gradients_are_those_of_the_merged_weights(family, tied, kind, monkeypatch):
    inputs = batch()
    reference = adapted_model(family, tied, kind=kind)
    expected = _reference(reference(**{k: inputs[k] for k in STOCK}).logits, inputs)
    expected.backward()

    seen = {}
    fused = forward_module.linear_coord_loss

    def watch(hidden, weight, labels, **options):
        seen.update(weight=weight, rows=options["coord_weight"])
        return fused(hidden, weight, labels, **options)

    monkeypatch.setattr(forward_module, "linear_coord_loss", watch)
    model = adapted_model(family, tied, kind=kind)
    bind_coord_loss(model, vocab=vocab(), objective=OBJECTIVE)
    loss = coord_loss(model, inputs).loss
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    assert trained.keys() == wanted.keys()
    assert any(part_of(name) == "coord_rows" for name in trained)
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert (trained[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    # The frozen base table itself, and 1,000 rows beside it: no merged copy of the vocabulary.
    assert isinstance(seen["weight"], torch.nn.Parameter)
    assert not seen["weight"].requires_grad
    assert seen["rows"].shape == (1000, seen["weight"].shape[1])
    assert seen["rows"].requires_grad


def _train(model, tmp_path, steps=2, **options):
    settings = TrainOptions(
        max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0, logging_steps=1, eval_steps=100, save_steps=100,
        report_to=(), **options,
    )  # fmt: skip
    trainer = CoordTrainer(
        model=model,
        objective=OBJECTIVE,
        vocab=vocab(),
        args=training_arguments(settings, tmp_path, seed=0),
        train_dataset=RecordDataset(records()[:8], template()),
        eval_dataset=RecordDataset(records()[:2], template()),
        data_collator=collator(),
    )
    trainer.train()


def _tables(model):
    return {
        "embedding": model.get_input_embeddings().weight.detach().clone(),
        "head": model.get_output_embeddings().weight.detach().clone(),
    }


@pytest.mark.parametrize("kind", ["dora", "rows"])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_training_moves_the_coordinate_rows_of_head_and_embedding_and_no_other_row(family, tied, kind, tmp_path):
    before = base_model(family, tied)
    old, weights = _tables(before), {k: v.clone() for k, v in before.state_dict().items()}
    model = adapt(base_model(family, tied), AdapterOptions(kind=kind), vocab(), base=workspace() / "model")
    _train(model, tmp_path)
    merged = model.merge_and_unload()
    new, space = _tables(merged), vocab()
    rows = torch.zeros(old["head"].shape[0], dtype=torch.bool)
    rows[space.start : space.start + 1000] = True
    for name in ("head", "embedding"):
        moved = (new[name] != old[name]).any(-1)
        assert not moved[~rows].any(), name
        # A row of the head is pushed by every softmax; a row of an embedding alone only where its bin was read.
        assert moved[rows].all() if name == "head" or tied else 8 <= moved[rows].sum() < 1000, name
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    elsewhere = {
        k for k, v in merged.state_dict().items() if "embed_tokens" not in k and k != "lm_head.weight" and not torch.equal(v, weights[k])
    }
    linear = {k for k in weights if "language_model.layers" in k and k.endswith("_proj.weight")}
    assert elsewhere == (linear if kind == "dora" else set())


@pytest.mark.parametrize("parts", [("vision",), ("aligner",), ("language_model",), ("vision", "aligner")])
def test_full_fine_tuning_trains_everything_but_frozen_parts(parts, tmp_path):
    before = {name: p.detach().clone() for name, p in base_model().named_parameters()}
    model = adapt(base_model(), AdapterOptions(freeze=parts), vocab(), base=workspace() / "model")
    _train(model, tmp_path, steps=1)
    moved = {part_of(name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"vision", "aligner", "language_model"} - set(parts)


def test_targets_mean_parts_or_ends_of_names_and_leave_out_head_and_frozen_parts():
    model = base_model()
    layers = {name: part_of(name) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"}
    chosen = target_layers(model, AdapterOptions(kind="lora"))
    assert chosen == sorted(name for name, part in layers.items() if part == "language_model")
    assert len(chosen) == 14
    for part in ("vision", "aligner"):
        assert target_layers(model, AdapterOptions(kind="lora", targets=part)) == sorted(n for n, p in layers.items() if p == part)
    both = target_layers(model, AdapterOptions(kind="lora", targets=("q_proj", "vision")))
    assert {name.rpartition(".")[2] for name in both if part_of(name) == "language_model"} == {"q_proj"}
    assert {part_of(name) for name in both} == {"language_model", "vision"}
    ends = target_layers(model, AdapterOptions(kind="lora", targets="linear_fc1", freeze=("vision",)))
    assert ends
    assert {part_of(name) for name in ends} == {"aligner"}


@pytest.mark.parametrize(("targets", "count"), [(("all-linear",), 42), (("all-linear", "aligner"), 48), (("vision",), 24)])
def test_exactly_the_targets_are_adapted_where_peft_shortens_long_lists_of_names(targets, count, tmp_path):
    from peft.tuners.lora import LoraLayer
    from transformers import Qwen3VLForConditionalGeneration

    config = tiny_config(dataclasses.replace(SMALL, num_layers=6, vision_depth=6), template().tokenizer)
    config.text_config.vocab_size = base_model().config.text_config.vocab_size
    model, options = Qwen3VLForConditionalGeneration(config), AdapterOptions(kind="lora", targets=targets)
    wanted = target_layers(model, options)
    assert len(wanted) == count
    adapted = adapt(model, options, vocab(), base=workspace() / "model")
    found = [name.removeprefix("base_model.model.") for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    assert sorted(found) == wanted
    adapted.save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) < count


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ("q_proj", "qproj")}, ("adapter.targets", "qproj", "all-linear", "k_proj")),
        ({"targets": "lm_head"}, ("adapter.targets", "lm_head", "q_proj")),
        ({"targets": "embed_tokens"}, ("adapter.targets", "embed_tokens")),
        ({"targets": "vision", "freeze": ("vision",)}, ("adapter.targets", "vision", "frozen")),
        ({"freeze": ("language_model",)}, ("adapter.targets", "all-linear", "language_model")),
    ],
)
def test_a_target_that_matches_nothing_is_refused_with_key_and_legal_names(options, words):
    with pytest.raises(ConfigError) as error:
        adapt(base_model(), AdapterOptions(kind="lora", **options), vocab(), base=workspace() / "model")
    assert len(str(error.value).splitlines()) == 1
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_calls_a_separate_head_tied_is_refused(kind):
    model = base_model("qwen25", tied=False)
    model.config.tie_word_embeddings = True
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        adapt(model, AdapterOptions(kind=kind), vocab(), base=workspace() / "model")


@PEFT_NOISE[0]
def test_a_head_adapted_behind_the_losss_back_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base_model(tied=False), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match="lm_head"):
        bind_coord_loss(model, vocab=vocab(), objective=OBJECTIVE)
    rows = list(range(5, 1005))
    other = get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows))
    with pytest.raises(ConfigError, match="other rows"):
        bind_coord_loss(other, vocab=vocab(), objective=OBJECTIVE)


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_a_bound_model_generates_what_the_stock_model_generates(kind):

    prompts = [template().encode_prompt(records()[0])]
    stock, bound = (base_model() if kind == "none" else adapted_model(kind=kind) for _ in range(2))
    bind_coord_loss(bound, vocab=vocab(), objective=OBJECTIVE)
    answers = [generate(model, template().tokenizer, prompts, vocab=vocab(), max_new_tokens=5)[0] for model in (stock, bound)]
    assert answers[0].token_ids == answers[1].token_ids
    torch.testing.assert_close(answers[0].coord_logits, answers[1].coord_logits, rtol=0, atol=0)


@PEFT_NOISE[0]
@PEFT_NOISE[1]
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_merged_and_through_peft_alike(kind, tied, tmp_path):
    from peft import PeftModel

    model = adapted_model(tied=tied, kind=kind).eval()
    trainer = CoordTrainer(
        model=model,
        objective=OBJECTIVE,
        vocab=vocab(),
        args=training_arguments(TrainOptions(max_steps=9, report_to=()), tmp_path / "out", seed=0),
        train_dataset=RecordDataset(records()[:4], template()),
        eval_dataset=RecordDataset(records()[:4], template()),
        data_collator=collator(),
        processor_from=workspace() / "model",
        processing_class=template().tokenizer,
    )
    folder = tmp_path / "adapter"
    trainer.save_model(str(folder))
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    inputs = {k: v for k, v in batch().items() if k in STOCK}
    with torch.no_grad():
        expected = model(**inputs).logits
        plain = base_model(tied=tied)(**inputs).logits
        loaded = load_model(folder)
        again = loaded(**inputs).logits
        stock = PeftModel.from_pretrained(base_model(tied=tied), folder)(**inputs).logits
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(stock, expected, rtol=0, atol=0)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert type(loaded).__name__ == "Qwen3VLForConditionalGeneration"


def test_an_adapter_without_its_base_or_weights_is_one_line(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(workspace() / "model", base)
    folder = tmp_path / "adapter"
    model = adapt(base_model(), AdapterOptions(kind="rows"), vocab(), base=base)
    model.save_pretrained(folder)
    template().tokenizer.save_pretrained(folder)
    check_model_folder(folder)
    recorded = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert recorded == str(base.resolve())

    base.rename(tmp_path / "moved")
    for use in (check_model_folder, load_model):
        with pytest.raises(ConfigError, match=r"base_model_name_or_path: there is no folder .*base") as error:
            use(folder)
        assert len(str(error.value).splitlines()) == 1
    (tmp_path / "moved").rename(base)
    (folder / "adapter_model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors is missing"):
        load_model(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names its base_model_name_or_path"):
        load_model(folder)


def _cut(folder):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])


def _other_base(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(workspace() / "tiny")}))


def _other_method(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "NONSENSE"}))


@pytest.mark.parametrize("damage", [_cut, _other_base, _other_method])
def test_a_damaged_adapter_or_another_base_is_one_line(damage, tmp_path):
    adapt(base_model(), AdapterOptions(kind="lora"), vocab(), base=workspace() / "model").save_pretrained(tmp_path)
    template().tokenizer.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match="damaged or does not fit") as error:
        load_model(tmp_path)
    assert len(str(error.value).splitlines()) == 1


@PEFT_NOISE[0]
@PEFT_NOISE[1]
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["lora", "rows"])
def test_rows_written_into_the_tables_give_the_same_logits_without_a_copy_and_leave_no_trace(kind, tied):
    model = adapted_model(tied=tied, kind=kind).eval()
    inputs = {k: batch()[k] for k in STOCK}
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    _, head = head_layers(model.get_base_model())
    table = head.weight.data_ptr()
    with torch.no_grad():
        wrapped = model(**inputs).logits
        with rows_in_place(model):
            assert head.weight.data_ptr() == table
            torch.testing.assert_close(model(**inputs).logits, wrapped, rtol=0, atol=0)
        torch.testing.assert_close(model(**inputs).logits, wrapped, rtol=0, atol=0)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def test_disabled_adapters_leave_the_base_table():
    model = adapted_model(kind="lora")
    layer, _ = head_layers(model)
    assert head_of(layer, vocab()).coord_weight is not None
    with model.disable_adapter():
        assert head_of(layer, vocab()).coord_weight is None


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"rank": 0}, "adapter.rank"),
        ({"alpha": 0.0}, "adapter.alpha"),
        ({"alpha": float("nan")}, "adapter.alpha"),
        ({"dropout": 1.0}, "adapter.dropout"),
        ({"targets": ()}, "adapter.targets"),
        ({"targets": ""}, "adapter.targets"),
        ({"kind": "rows", "new_rows": False}, "adapter.new_rows"),
        ({"freeze": ("vision", "aligner", "language_model")}, "adapter.freeze"),
    ],
)
def test_options_that_cannot_work_name_their_key(options, key):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        AdapterOptions(**options)
