"""Made scenes: exact boxes, equal bytes for equal options, disjoint splits, nothing half-written."""

from __future__ import annotations

import fcntl
import filecmp
import os

import numpy as np
import pytest

from coordexp.boxes import iou_matrix
from coordexp.data.options import SynthOptions
from coordexp.data.records import read_records, verify_images
from coordexp.data.synthetic import COLORS, SHAPES, SIZES, make_scene, scene_seed, write_scenes
from coordexp.errors import ConfigError

SMALL = SynthOptions(train=6, val=2, test=3)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [32, 96, 131])
def test_a_box_is_the_extent_of_the_pixels_that_differ_from_the_bare_background(shape, side):
    options = SynthOptions(side=side, shapes=(shape,), colors=tuple(COLORS), max_objects=1)
    bare = SynthOptions(side=side, min_objects=0, max_objects=0)
    for seed in range(60):
        image, (item,) = make_scene(seed, options)
        background, nothing = make_scene(seed, bare)
        assert nothing == []
        ys, xs = np.nonzero(np.any(np.asarray(image) != np.asarray(background), axis=-1))
        assert item["bbox_2d"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_scenes_hold_what_the_options_say():
    options = SynthOptions(colors=tuple(COLORS), shapes=tuple(SHAPES), min_objects=2, max_objects=4)
    counts, words = set(), set()
    for seed in range(120):
        image, objects = make_scene(seed, options)
        assert image.size == (96, 96)
        counts.add(len(objects))
        assert objects == sorted(objects, key=lambda item: (item["bbox_2d"][1], item["bbox_2d"][0]))
        boxes = np.array([item["bbox_2d"] for item in objects])
        assert boxes.min() >= 1
        assert boxes.max() <= 95
        assert np.count_nonzero(iou_matrix(boxes, boxes)) == len(boxes)
        for item in objects:
            size, color, shape = item["desc"].split(" ")
            words |= {size, color, shape}
            x1, y1, x2, y2 = item["bbox_2d"]
            low, high = SIZES[size]
            assert x2 - x1 == y2 - y1
            assert low * 96 - 0.5 <= x2 - x1 <= high * 96 + 0.5
    assert counts == {2, 3, 4}
    assert words == {*SIZES, *COLORS, *SHAPES}


def test_the_colour_inside_an_object_is_nearest_to_the_colour_it_is_named_after():
    options = SynthOptions(colors=tuple(COLORS), shapes=("square",), max_objects=1)
    palette = np.array(list(COLORS.values()))
    right = 0
    for seed in range(200):
        image, (item,) = make_scene(seed, options)
        x1, y1, x2, y2 = item["bbox_2d"]
        pixel = np.asarray(image, dtype=float)[(y1 + y2) // 2, (x1 + x2) // 2]
        right += list(COLORS)[np.abs(palette - pixel).sum(axis=1).argmin()] == item["desc"].split(" ")[1]
    assert right >= 195


def test_two_writes_give_the_same_bytes(tmp_path):
    paths = write_scenes(tmp_path / "a", SMALL)
    write_scenes(tmp_path / "b", SMALL)
    assert paths == {split: tmp_path / "a" / f"{split}.jsonl" for split in ("train", "val", "test")}
    names = tree(tmp_path / "a")
    assert len(names) == 3 + 11 + 1  # .coordexp.json
    assert names == tree(tmp_path / "b")
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False) == (names, [], [])


def test_written_records_are_valid_and_their_seed_makes_the_scene_again(tmp_path):
    seen = []
    paths = write_scenes(tmp_path / "a", SMALL, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 11) for i in range(1, 12)]
    for split, path in paths.items():
        records = read_records(path).records
        verify_images(records)
        assert [r.image_id for r in records] == [f"{split}-{i:06d}" for i in range(getattr(SMALL, split))]
        for record in records:
            _, objects = make_scene(record.metadata["seed"], SMALL)
            assert [(o.desc, list(o.values)) for o in record.objects] == [(o["desc"], o["bbox_2d"]) for o in objects]


def test_no_two_scenes_of_any_split_or_seed_share_a_seed():
    seeds = [
        scene_seed(seed, split, i) for seed in (0, 1, 2, 2**29 - 1) for split in ("train", "val", "test") for i in (0, 1, 2, 2**32 - 1)
    ]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**63
    with pytest.raises(ConfigError, match=r"data.synth.seed"):
        scene_seed(2**29, "train", 0)
    with pytest.raises(ConfigError, match=r"data.synth.seed"):
        scene_seed(-1, "train", 0)


def test_held_out_scenes_and_other_seeds_are_other_scenes(tmp_path):
    images = set()
    for seed in (0, 1):
        for path in write_scenes(tmp_path / str(seed), SynthOptions(train=3, val=3, test=3, seed=seed)).values():
            images |= {record.image.read_bytes() for record in read_records(path).records}
    assert len(images) == 18


def test_unknown_names_are_refused_all_at_once_with_the_legal_ones(tmp_path):
    with pytest.raises(ConfigError) as caught:
        write_scenes(tmp_path / "a", SynthOptions(colors=("read",), shapes=("sqare", "circle"), sizes=()))
    color, shape, size = caught.value.problems
    assert "data.synth.colors: expected names among red, green, blue" in color
    assert "got 'read': did you mean 'red'?" in color
    assert "data.synth.shapes: expected names among circle, square" in shape
    assert "did you mean 'square'?" in shape
    assert "data.synth.sizes: expected at least one of small, medium, large, got none" in size
    assert os.listdir(tmp_path) == []


def test_objects_that_cannot_fit_are_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(ConfigError, match=r"data.synth.min_objects: expected objects that fit, got 9 of sizes large"):
        write_scenes(tmp_path / "a", SynthOptions(min_objects=9, max_objects=9, sizes=("large",)))
    assert os.listdir(tmp_path) == []


def test_a_used_folder_is_kept_unless_it_is_a_data_set_to_overwrite(tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    write_scenes(out, SMALL)
    with pytest.raises(ConfigError, match=r"not empty: choose another output folder, or remove it"):
        write_scenes(out, SMALL)
    write_scenes(out, SynthOptions(train=1, val=1, test=1), overwrite=True)
    assert len(tree(out)) == 7
    (out / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=r"holds 'thesis.txt', which this command did not write"):
        write_scenes(out, SMALL, overwrite=True)
    assert len(tree(out)) == 8
    assert os.listdir(tmp_path) == ["a"]


def test_an_interrupted_write_leaves_nothing_and_its_remains_are_swept(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "a", SMALL, stop)
    assert os.listdir(tmp_path) == []
    # What a killed call left has the mark; what another program made has not, and what a call is still filling is locked.
    for name in ("left", "foreign", "busy"):
        (tmp_path / f".a.{name}.tmp").mkdir()
    (tmp_path / ".a.left.tmp" / ".coordexp-staging").touch()
    with (tmp_path / ".a.busy.tmp" / ".coordexp-staging").open("xb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_scenes(tmp_path / "a", SMALL)
    assert sorted(os.listdir(tmp_path)) == [".a.busy.tmp", ".a.foreign.tmp", "a"]
