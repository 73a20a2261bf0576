"""The image size policy: recorded at training, the same at prediction, and boxes that follow every resize."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from coordexp.codec import CoordCodec
from coordexp.modeling.load import link_model_folder, load_image_processor, pixel_budget, write_pixel_budget
from tiny import workspace

PATCH, MERGE, MEAN, STD = 8, 2, 0.5, 0.5


def _resized(processor, image):
    """The picture that the model sees, ``[H, W]`` grey in 0..1, put together again from its patches."""
    features = processor(images=[image], return_tensors="np")
    _, rows, columns = (int(n) for n in features["image_grid_thw"][0])
    patches = np.asarray(features["pixel_values"]).reshape(rows // MERGE, columns // MERGE, MERGE, MERGE, 3, 2, PATCH, PATCH)
    # Blocks of MERGE x MERGE patches in reading order; channel 0, first of the two equal frames.
    grey = patches[:, :, :, :, 0, 0].transpose(0, 2, 4, 1, 3, 5).reshape(rows * PATCH, columns * PATCH)
    return grey * STD + MEAN


def _profile(side, low, high):
    """Dark, bright, dark, with ramps of 12 pixels that pass half their height at ``low`` and ``high``; filters keep them straight."""
    centre = np.arange(side) + 0.5
    return np.clip(np.minimum((centre - low) / 12, (high - centre) / 12) + 0.5, 0, 1)


def _edges(values):
    """Start and end of the one bright stretch of a profile, at half its height, to a part of a pixel."""
    bright = values > 0.5
    first, last = int(np.argmax(bright)), len(values) - int(np.argmax(bright[::-1]))
    # Between the centres of two neighbouring pixels the profile is read as a straight line.
    rise = first - 0.5 + (0.5 - values[first - 1]) / (values[first] - values[first - 1])
    fall = last - 0.5 + (values[last - 1] - 0.5) / (values[last - 1] - values[last])
    return rise, fall


@pytest.mark.parametrize("size", [(517, 333), (333, 517), (641, 479), (301, 299), (1023, 257), (250, 751)], ids=str)
@pytest.mark.parametrize("budget", [(1024, 1 << 22), (1024, 90_000), (700_000, 1 << 22)], ids=["rounded", "shrunk", "enlarged"])
def test_the_bins_of_a_box_are_the_same_in_the_resized_image_within_half_a_bin(size, budget):
    """Coordinates are shares of a side, so rounding a side to whole patches moves no bin, whatever it does to the aspect."""
    width, height = size
    processor = load_image_processor(workspace() / "model", min_pixels=budget[0], max_pixels=budget[1])
    box = (round(0.21 * width), round(0.33 * height), round(0.78 * width), round(0.71 * height))
    grey = np.minimum(_profile(height, box[1], box[3])[:, None], _profile(width, box[0], box[2])[None])
    seen = _resized(processor, Image.fromarray(np.round(255 * grey).astype(np.uint8)).convert("RGB"))
    assert seen.shape[0] % (PATCH * MERGE) == seen.shape[1] % (PATCH * MERGE) == 0
    assert budget[0] <= seen.shape[0] * seen.shape[1] <= budget[1]
    assert seen.shape != (height, width)
    middle = (seen.shape[0] * (box[1] + box[3]) // (2 * height), seen.shape[1] * (box[0] + box[2]) // (2 * width))
    left, right = _edges(seen[middle[0]])
    top, bottom = _edges(seen[:, middle[1]])
    codec = CoordCodec()
    for found, true, new, old in (
        (left, box[0], 1, width),
        (top, box[1], 0, height),
        (right, box[2], 1, width),
        (bottom, box[3], 0, height),
    ):
        assert abs(codec.to_bin(found, seen.shape[new]) - codec.to_bin(true, old)) <= 0.5


@given(width=st.integers(17, 3000), height=st.integers(17, 3000), x=st.floats(0, 1), y=st.floats(0, 1), least=st.integers(1024, 1 << 18))
def test_a_position_and_its_image_under_the_resize_have_one_bin_position_and_the_budget_holds(width, height, x, y, least):
    """The resize is ``x -> x W'/W``; the bin of both is a share of the side."""
    new_height, new_width = smart_resize(height, width, PATCH * MERGE, least, 16 * least)
    if 16 * PATCH * MERGE * min(width, height) > max(width, height):  # a thinner image ends at one block, whatever the budget
        assert new_height * new_width <= 16 * least or min(new_height, new_width) == PATCH * MERGE
        assert new_height * new_width >= least
    patches = _processor().get_number_of_image_patches(height, width, {"min_pixels": least, "max_pixels": 16 * least})
    assert patches * PATCH**2 == new_height * new_width
    codec = CoordCodec()
    for share, old, new in ((x, width, new_width), (y, height, new_height)):
        assert abs(codec.to_bin(share * old * new / old, new) - codec.to_bin(share * old, old)) < 1e-9


@lru_cache
def _processor():
    return load_image_processor(workspace() / "model")


def test_the_budget_is_written_into_every_form_of_processor_file(tmp_path):
    for layout in ("old", "nested", "older keys"):
        folder = tmp_path / layout
        shutil.copytree(workspace() / "model", folder)
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        if layout == "nested":
            (folder / "preprocessor_config.json").unlink()
            (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor", "image_processor": settings}))
        elif layout == "older keys":
            del settings["size"]
            (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"min_pixels": 3136, "max_pixels": 12_845_056}))
            assert pixel_budget(load_image_processor(folder)) == (3136, 12_845_056)
        wanted = load_image_processor(folder, min_pixels=2048, max_pixels=8192)
        assert pixel_budget(wanted) == (2048, 8192), layout
        write_pixel_budget(folder, wanted)
        assert pixel_budget(load_image_processor(folder)) == (2048, 8192), layout


def test_a_folder_of_links_reads_like_its_source_and_leaves_it_alone(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(workspace() / "model", source)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    link_model_folder(source, tmp_path / "linked")
    write_pixel_budget(tmp_path / "linked", load_image_processor(tmp_path / "linked", max_pixels=2048))
    assert pixel_budget(load_image_processor(tmp_path / "linked"))[1] == 2048
    assert (tmp_path / "linked" / "model.safetensors").is_symlink()
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
