"""``benchmarks/rehearsal.py``: the same stages on a tiny shape."""

from __future__ import annotations

import csv
import os
import sys

import pytest
from PIL import Image

import coordexp.train.launch  # noqa: F401  loaded once, before the forks
import rehearsal
from coordexp.cli import main as cli

BOX = "<object><name>cell</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


@pytest.fixture
def photos(tmp_path):
    """A Pascal VOC folder of six small photos."""
    root = tmp_path / "voc"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    names = [f"photo{i}" for i in range(8)]
    for i, name in enumerate(names):
        Image.effect_noise((96, 64), 40).convert("RGB").save(root / "JPEGImages" / f"{name}.jpg")
        objects = "".join(BOX.format(4 + 9 * k, 5, 20 + 9 * k, 30) for k in range(i % 3 + 1))
        size = "<size><width>96</width><height>64</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
    for split, part in (("train", names[:4]), ("val", names[4:6]), ("test", names[6:])):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in part))
    return root


def _fork(words):
    """As ``rehearsal.spawn``, in a fork: the libraries are loaded already."""
    child = os.fork()
    if child:
        return child
    code = 1
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  pytest's own would not follow the file descriptor
    try:
        if words[0] == "--write":
            rehearsal.write(words[1], rehearsal.Path(words[2]))
            code = 0
        else:
            sys.argv = ["coordexp", *words]
            cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def test_every_stage_runs_on_a_tiny_shape_and_none_a_second_time(photos, tmp_path):
    made = rehearsal.Rehearsal("tiny", photos, tmp_path / "work", start=_fork, full="adamw_torch_fused")
    rows = made.run()
    stages = ["write", "extend", "doctor", "plan", "train", "resume", "predict", "export", "verify", "plan full", "full"]
    assert [row["stage"] for row in rows] == stages
    assert len(list((tmp_path / "work" / "base").glob("*.safetensors"))) > 1
    assert all(row["s"] > 0 and row["peak_mb"] > 50 for row in rows)
    assert all("predicted_mb" in row for row in rows if row["stage"] in ("train", "resume", "full"))
    assert (tmp_path / "work" / "lora" / "checkpoints" / "final").is_dir()

    def start(words):
        raise AssertionError(f"{words} ran again")

    assert rehearsal.Rehearsal("tiny", photos, tmp_path / "work", start=start, full="adamw_torch_fused").run() == rows
    rehearsal.save("tiny", rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [row["stage"] for row in csv.DictReader(file)] == stages
