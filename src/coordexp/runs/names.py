"""Names that metrics had in older logs, and the kept name of each."""

from __future__ import annotations

from typing import Final

# The older stack wrote *weighted* contributions under `soft_ce`, `w1` and `gate`; the rules ask
# `Subject.term_scale` before they take such a value as raw.
OLD_NAMES: Final[dict[str, str]] = {
    "acc": "token_acc",
    "lr": "learning_rate",
    "coord_diag/loss": "coord_softce_w1/loss",
    "coord_diag/ce": "coord_softce_w1/ce",
    "coord_diag/soft_ce": "coord_softce_w1/soft_ce",
    "coord_diag/w1": "coord_softce_w1/w1",
    "coord_diag/gate": "coord_softce_w1/gate",
    "coord_diag/text_gate": "coord_softce_w1/text_gate",
    "coord_diag/coord_tokens": "coord_softce_w1/coord_tokens",
    "coord_diag/coord_tokens_total": "coord_softce_w1/coord_tokens",
    "coord_diag/coord_vocab_mass": "coord_softce_w1/coord_vocab_mass",
    "coord_diag/coord_vocab_mass_mean": "coord_softce_w1/coord_vocab_mass",
    "coord_diag/text_coord_vocab_mass": "coord_monitor/coord_vocab_mass_at_gt_text",
    "coord_diag/p_gt_mean": "coord_softce_w1/p_gt_mean",
    "coord_diag/margin_mean": "coord_softce_w1/margin_mean",
    "coord_diag/acc_top5": "coord_softce_w1/acc_top5",
    "coord_diag/expected_bin_mae": "coord_expected_bin_mae",
    "coord_diag/expected_bin_abs_err_p90": "coord_dist/abs_err_p90",
    "coord_softce_w1/coord_vocab_mass_mean": "coord_softce_w1/coord_vocab_mass",
    "coord_softce_w1/expected_bin_mae": "coord_expected_bin_mae",
    "coord_softce_w1/kl": "coord_dist/kl",
}


# How other programs mark a value of the evaluation.
_EVAL_TAGS: Final = ("val/", "valid/", "validation/", "eval/", "val_", "valid_", "validation_")


def kept_name(key: str, prefix: str = "eval_") -> str:
    """The kept name of a key, with or without the evaluation prefix; a key that is not old comes back as it is.

    ``val/KEY``, ``valid_KEY`` and the like are evaluation values, ``train/KEY`` is ``KEY``.
    """
    tag = next((tag for tag in _EVAL_TAGS if key.startswith(tag)), None)
    key = key.removeprefix("train/") if tag is None else prefix + key[len(tag) :]
    if key.startswith(prefix):
        return prefix + OLD_NAMES.get(key[len(prefix) :], key[len(prefix) :])
    return OLD_NAMES.get(key, key)
