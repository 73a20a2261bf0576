"""Configuration: strict, all faults at once, resolved form reproduces itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coordexp.config.load import config_sha256, dump_config, load_config
from coordexp.errors import ConfigError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def _write(folder, text, name="x.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(p for p in EXPERIMENTS.glob("*.yaml") if not p.stem.startswith("ab_")), ids=lambda p: p.stem)
def test_every_shipped_experiment_loads_and_its_resolved_form_loads_to_the_same(path, tmp_path):
    config = load_config(path)
    assert config.name == path.stem
    assert config.question
    again = load_config(_write(tmp_path, dump_config(config), "other.yaml"))
    assert again == config
    assert config_sha256(again) == config_sha256(config)


def test_all_faults_are_reported_at_once_with_dotted_paths_and_nearest_names(tmp_path):
    path = _write(
        tmp_path,
        "data: {kind: synth, synth: {trian: 3, side: nine}}\nobjectve: {}\nobjective: {sigma: -1, gate: wide}\ntrain: {max_step: 5}\n",
    )
    with pytest.raises(ConfigError) as error:
        load_config(path, ["train.learning_rat=1", "decode.readout=mean", "nonsense"])
    text = "\n".join(error.value.problems)
    for part in (
        "data.synth.trian: unknown key: did you mean data.synth.train?",
        "data.synth.side: expected",
        "objectve: unknown key: did you mean objective?",
        "objective.gate: expected",
        "train.max_step: unknown key: did you mean train.max_steps?",
        "--set train.learning_rat: unknown key: did you mean train.learning_rate?",
        "--set decode.readout: expected",
        "--set nonsense: expected section.key=value",
    ):
        assert part in text, part
    assert all(problem.startswith(("x.yaml: ", "--set ")) for problem in error.value.problems)


def test_a_components_own_check_is_reported_with_its_key(tmp_path):
    with pytest.raises(ConfigError, match=r"objective\.sigma: expected a positive number, got -1"):
        load_config(_write(tmp_path, "data: {kind: synth}\nobjective: {sigma: -1}\n"))
    with pytest.raises(ConfigError, match=r"data\.source: expected a folder"):
        load_config(_write(tmp_path, "data: {kind: voc}\n"))


def test_extends_merges_deeply_and_set_wins(tmp_path):
    _write(tmp_path, "data: {kind: synth}\ntrain: {max_steps: 5, learning_rate: 1e-3}\nseed: 3\n", "base.yaml")
    path = _write(tmp_path, "extends: base.yaml\ntrain: {max_steps: 7}\n")
    config = load_config(path, ["seed=4", "objective.temperature=2.5e-1"])
    assert (config.train.max_steps, config.train.learning_rate, config.seed, config.objective.temperature) == (7, 1e-3, 4, 0.25)
    assert config.name == "x"


def test_a_cycle_of_extends_a_double_key_a_missing_file_and_a_broken_file_are_one_line_errors(tmp_path):
    _write(tmp_path, "extends: b.yaml\n", "a.yaml")
    _write(tmp_path, "extends: a.yaml\n", "b.yaml")
    cases = {
        "cycle": tmp_path / "a.yaml",
        "stands twice": _write(tmp_path, "seed: 1\nseed: 2\n", "double.yaml"),
        "no such experiment": tmp_path / "none.yaml",
        "not valid YAML": _write(tmp_path, "a: [1\n", "broken.yaml"),
        "expected a mapping": _write(tmp_path, "", "empty.yaml"),
    }
    for words, path in cases.items():
        with pytest.raises(ConfigError, match=words) as error:
            load_config(path)
        assert "\n" not in str(error.value)


@example(1.0, 0, "\x85 \u2028")
@settings(deadline=None, max_examples=40)
@given(st.floats(min_value=1e-12, max_value=1e12), st.integers(0, 2**31), st.text(max_size=20))
def test_any_value_survives_the_resolved_form(tmp_path_factory, rate, seed, prompt):
    import dataclasses

    folder = tmp_path_factory.mktemp("config")
    base = load_config(EXPERIMENTS / "demo.yaml")
    config = dataclasses.replace(
        base,
        seed=seed,
        data=dataclasses.replace(base.data, prompt=prompt),
        train=dataclasses.replace(base.train, learning_rate=rate),
    )
    assert load_config(_write(folder, dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.max_steps=true", "train.max_steps: expected a whole number, got True"),
        ('train.max_steps="5"', "train.max_steps: expected a whole number, got '5'"),
        ("train.max_steps=1.5", "train.max_steps: expected a whole number, got 1.5"),
        ("train.save_total_limit=many", "train.save_total_limit: expected a whole number, got 'many'"),
        ("objective.sigma=false", "objective.sigma: expected a number, got False"),
        ("objective.alpha=wide", "objective.alpha: expected a number, got 'wide'"),
        ("train.bf16=1", "train.bf16: expected true or false, got 1"),
        ("name=5", "name: expected text, got 5"),
        ("name=..", "name: expected the name of a folder, without slashes, got '..'"),
        ("name=a/b", "name: expected the name of a folder, without slashes, got 'a/b'"),
        ("name=''", "name: expected the name of a folder, without slashes, got ''"),
        ("train=5", "train: expected a section of keys, got 5"),
        ("data.synth.colors=red", "data.synth.colors: expected a list, got 'red'"),
        ("seed.x=1", "seed: expected a whole number, got {'x': 1}"),
        ("train.x.y=1", "train.x: unknown key: expected one of num_train_epochs, "),
        ("seed=[1", "--set seed=[1: the value is not valid YAML: line 1: "),
        ("seed={a: 1, a: 2}", "--set seed={a: 1, a: 2}: the value is not valid YAML: line 1: the key 'a' stands twice"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_not_converted(override, problem, tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config(_write(tmp_path, "data: {kind: synth}\n"), [override])
    assert len(error.value.problems) == 1
    # Blamed on the flag, not on the file, which is right; the key is not said twice, and a value that is no YAML is shown whole.
    key = override.partition("=")[0]
    expected = problem if problem.startswith("--set ") else f"--set {key}: {problem.removeprefix(f'{key}: ')}"
    assert error.value.problems[0].startswith(expected)


def test_a_fault_is_blamed_on_the_last_flag_that_set_it_and_others_on_the_file(tmp_path):
    path = _write(tmp_path, "data: {kind: synth}\nobjective: {sigma: -1}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, ["train.max_steps=x", "train.max_steps=y", "vocab={extnd: true}"])
    assert sorted(error.value.problems) == [
        "--set train.max_steps: expected a whole number, got 'y'",
        "--set vocab: vocab.extnd: unknown key: did you mean vocab.extend?",
        "x.yaml: objective.sigma: expected a positive number, got -1.0",
    ]


@pytest.mark.parametrize("term", ["text_ce", "text_gate", "ce", "soft_ce", "w1", "crps", "gate"])
def test_a_negative_weight_is_refused_but_for_the_spread_of_a_distribution(term, tmp_path):
    path = _write(tmp_path, "data: {kind: synth}\nobjective: {entropy: -0.1, variance: -0.01}\n")
    assert load_config(path).objective.entropy == -0.1
    with pytest.raises(ConfigError, match=rf"objective\.{term}: expected a weight of 0 or more, got -0\.1"):
        load_config(path, [f"objective.{term}=-0.1"])


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("detection.best.agnostc.f1.50", "did you mean detection.best.agnostic.f1.50?"),
        ("coco.file.a50", "did you mean coco.file.ap50?"),
        ("health.parserate", "did you mean health.parse_rate?"),
        ("zzz", "docs/metrics.md lists them"),
    ],
)
def test_a_misspelt_expectation_is_refused_before_the_run(key, hint, tmp_path):
    path = _write(tmp_path, f"data: {{kind: synth}}\nevaluate: {{expect: {{{key}: 0.5}}}}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert error.value.problems == [f"x.yaml: evaluate.expect.{key}: no number of results.json: {hint}"]


@pytest.mark.parametrize("text", ["1e3", "1E3", "+1e3", "1.e3", "1.0e+3", "1000.0", "1000", "1_000"])
def test_every_way_to_write_a_number_is_that_number(text, tmp_path):
    config = load_config(
        _write(tmp_path, f"data: {{kind: synth}}\ntrain: {{learning_rate: {text}, max_steps: {text}}}\n"), [f"objective.sigma={text}"]
    )
    assert (config.train.learning_rate, config.train.max_steps, config.objective.sigma) == (1000.0, 1000, 1000.0)
    assert type(config.train.max_steps) is int


def test_text_that_looks_like_something_else_stays_text(tmp_path):
    path = _write(tmp_path, "question: 2026-11-24\ndata: {kind: synth, prompt: 2026-13-45}\nmodel: {path: '1e5'}\n")
    config = load_config(path)
    assert (config.question, config.data.prompt, config.model.path) == ("2026-11-24", "2026-13-45", "1e5")
    assert load_config(_write(tmp_path, dump_config(config), "again.yaml")) == config


def test_an_empty_section_is_one_of_defaults_and_set_reaches_into_it(tmp_path):
    path = _write(tmp_path, "data:\ntrain:\n")
    config = load_config(path, ["data.kind=synth", "data.synth.side=64", "train.max_steps=7"])
    assert (config.data.kind, config.data.synth.side, config.train.max_steps) == ("synth", 64, 7)


def test_anchors_and_merge_keys_work_and_are_no_double_keys(tmp_path):
    config = load_config(_write(tmp_path, "data: {kind: synth}\nobjective: &o {sigma: 3, w1: 1}\n", "a.yaml"))
    merged = "data: {kind: synth, synth: {<<: {side: 64, train: 5}, train: 6}}\n"
    again = load_config(_write(tmp_path, merged, "b.yaml"))
    assert (config.objective.sigma, again.data.synth.side, again.data.synth.train) == (3, 64, 6)


@pytest.mark.parametrize(
    "text",
    [
        "? [a]\n: 1\n",
        "seed: !!int ''\n",
        "seed: !!bool x\n",
        "seed: !!timestamp x\n",
        "seed: !!python/name:os.x\n",
        "a: &a [*a]\n",
        "\0",
        "a: 1\n b: 2\n",
    ],
)
def test_yaml_that_cannot_be_read_is_one_line(text, tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML") as error:
        load_config(_write(tmp_path, text))
    assert len(error.value.problems) == 1
    assert "\n" not in str(error.value)


def test_a_missing_base_names_the_file_that_wants_it(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such experiment file \(extends: of x\.yaml\)"):
        load_config(_write(tmp_path, "extends: none.yaml\n"))


def test_a_file_in_another_encoding_is_one_line(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"question: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: expected a YAML file in UTF-8"):
        load_config(path)
