"""How long the audit of a long log takes: reading, then all rules; each round in a process of its own.

    python benchmarks/bench_audit.py [--rows 100000] [--rounds 5]

The bar: 100,000 rows within 5 s.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from pathlib import Path

from rounds import parser, rounds, save, tell

KEYS = (
    "base_ce/loss", "base_ce/noncoord_tokens", "coord_softce_w1/loss", "coord_softce_w1/soft_ce", "coord_softce_w1/w1",
    "coord_softce_w1/gate",
    "coord_softce_w1/coord_tokens", "coord_softce_w1/coord_vocab_mass", "coord_softce_w1/p_gt_mean", "coord_softce_w1/margin_mean",
    "coord_softce_w1/acc_top5", "coord_expected_bin_mae", "coord_dist/kl", "coord_dist/crps", "coord_dist/nll", "coord_dist/entropy",
    "coord_dist/std", "coord_dist/tail_mass", "coord_dist/multimodal_frac", "coord_dist/argmax_bin_mae", "coord_dist/median_bin_mae",
    "coord_dist/window_bin_mae", "coord_dist/topk_bin_mae", "coord_dist/signed_bias", "token_acc", "token_acc_top5", "text_token_acc",
    "coord_token_acc", "desc_token_acc", "format_token_acc", "contrib/text_ce", "contrib/text_gate", "contrib/ce", "contrib/soft_ce",
    "contrib/w1", "contrib/crps", "contrib/gate", "contrib/entropy", "contrib/variance", "loss",
)  # fmt: skip


def write(path: Path, count: int, ours: bool) -> None:
    """A log of ``count`` training rows and an evaluation every hundredth, with the keys of a run of ours."""
    rng = random.Random(0)
    with path.open("w") as file:
        if ours:
            file.write(json.dumps({"schema": 1, "kind": "header"}) + "\n")
        for step in range(1, count + 1):
            place = {"step": step} if ours else {"global_step/max_steps": f"{step}/{count}"}
            level = 0.2 + math.exp(-4 * step / count)
            row = {key: level * (1 + 0.05 * rng.random()) for key in KEYS}
            extra = {"grad_norm": 1 + rng.random(), "learning_rate": 1e-4, "epoch": step / count}
            extra |= {"accum/grad_steps": 8.0, "accum/current_grad_steps": 8.0}
            file.write(json.dumps({**place, **row, **extra}) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({**place, **{f"eval_{key}": level * (1 + 0.01 * rng.random()) for key in KEYS}}) + "\n")


def measure(path: Path) -> None:
    """Read and judge, and print seconds: run in a fresh process."""
    from coordexp.runs.audit import judge, load

    begin = time.perf_counter()
    judge(load(path))
    tell(time.perf_counter() - begin)


def main() -> None:
    """A row of the results for our own kind of log and for ms-swift's."""
    words = parser(__doc__, count=5)
    words.add_argument("--rows", type=int, default=100_000)
    options = words.parse_args()
    if options.measure:
        measure(options.measure)
        return
    for kind in ("run", "ms-swift"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "logging.jsonl"
            write(path, options.rows, kind == "run")
            size = path.stat().st_size / 2**20
            found = rounds(__file__, [path], options.rounds)
        what = {"log": kind, "rows": options.rows, "keys": len(KEYS) + 6, "file_mb": f"{size:.0f}"}
        save("audit", what, found)


if __name__ == "__main__":
    main()
