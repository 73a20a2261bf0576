"""Configuration: strict, all faults at once, resolved form reproduces itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.config.load import config_sha256, dump_config, load_config
from coordexp.errors import ConfigError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def _write(folder, text, name="x.yaml"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda p: p.stem)
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
        "train.learning_rat: unknown key: did you mean train.learning_rate?",
        "decode.readout: expected",
        "--set nonsense: expected section.key=value",
    ):
        assert part in text, part
    assert all(problem.startswith("x.yaml: ") for problem in error.value.problems)


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
