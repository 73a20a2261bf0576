"""The one image loader: orientation, modes, and files that are refused with their path."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from coordexp.data.images import image_size, load_image, orientation
from coordexp.errors import DataError


def picture() -> np.ndarray:
    """24x16 with four differently coloured quarters, so that every turn and flip differs."""
    array = np.zeros((16, 24, 3), dtype=np.uint8)
    array[:8, :12], array[:8, 12:], array[8:, :12], array[8:, 12:] = (250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10)
    return array


# How the stored array becomes upright, by the EXIF standard: where row 0 and column 0 of the stored array stand.
UPRIGHT = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("value", range(1, 9))
def test_every_exif_orientation_is_applied_and_the_header_tells_the_upright_size(tmp_path, suffix, value):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = value
    options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(picture()).save(path, exif=exif, **options)
    expected = UPRIGHT[value](picture())
    loaded = load_image(path)
    assert loaded.size == image_size(path) == (expected.shape[1], expected.shape[0])
    assert np.abs(np.asarray(loaded).astype(int) - expected).max() <= 12
    if suffix != "tif":  # turned by the library itself
        assert orientation(path) == value


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 32_768, 40_000, 65_535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        loaded = load_image(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(loaded)[0, :, 0], np.round(values[0] / 65_535 * 255))
        assert loaded.mode == "RGB"


def test_transparency_is_laid_over_white_whatever_colour_it_hides(tmp_path):
    pixels = np.array([[[200, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png"))[0], [[200, 0, 0], [255] * 3, [204] * 3])
    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((1, 0), (0, 0))
    grey.save(tmp_path / "b.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "b.png"))[0], [[0] * 3, [255] * 3])
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 9, 9, 0, 128, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "c.png", transparency=0)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "c.png"))[0], [[255] * 3, [0, 128, 0]])


def test_cmyk_and_grey_become_rgb(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(np.asarray(load_image(tmp_path / "a.jpg")).astype(int) - (255, 0, 0)).max() <= 8
    Image.new("L", (4, 4), 77).save(tmp_path / "b.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "b.png")), 77)


def _truncated(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1000])


def _float(path):
    Image.fromarray(np.ones((3, 3), dtype=np.float32)).save(path, format="TIFF")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_truncated, "expected a whole image"),
        (_float, "expected 8 or 16 bits a channel, got mode 'F'"),
        (lambda p: p.write_text("no image"), "got something else"),
        (lambda p: p.write_bytes(b""), "got something else"),
        (lambda p: p.mkdir(), "expected a whole image"),
        (lambda p: None, "got nothing at"),
        (lambda p: p.symlink_to("gone.png"), "link whose target is gone: import with --copy"),
    ],
)
def test_unusable_files_are_refused_with_their_path_in_one_line(tmp_path, make, message):
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(DataError) as caught:
        load_image(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pixels", [150, 250])
def test_a_picture_beyond_the_limit_is_refused_before_it_is_decoded(tmp_path, monkeypatch, pixels):
    Image.new("RGB", (pixels, 1)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (image_size, load_image):
        with pytest.raises(DataError, match=r"at most 100 pixels, got a larger one at .*a\.png"):
            read(tmp_path / "a.png")
