"""The one way in for pixels: every image of the package is opened here. PIL and the standard library only.

What is stated and always done:

- An EXIF orientation is **applied**. Width and height of an image are those of the upright picture, and boxes are
  counted there. A record that states the stored size instead is an error, never a guess.
- Result: 8-bit RGB. Grey is repeated, palettes are looked up, CMYK is converted, transparency is laid over white.
  16-bit grey is scaled (65,535 becomes 255). 32-bit integer and float images have no stated white and are refused.
- Of an animation or a stack the first picture is taken.
- A picture of more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels (89,478,485 unless changed), a truncated file and
  anything that PIL cannot read are refused with the path.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from coordexp.errors import DataError

# What PIL raises for files it cannot read, by format and by where the damage is.
_ERRORS: Final = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error, OverflowError, MemoryError)
_BOMBS: Final = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# Orientations 5 to 8 lay the picture on its side.
_SIDEWAYS: Final = (5, 6, 7, 8)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of the upright picture, from the header alone (see :func:`load_image` for the pixels).

    Raises:
        DataError: missing, no image, or too large; names the path.
    """
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def orientation(path: Path) -> int:
    """The EXIF orientation of the file's header, 1 where it has none.

    Raises:
        DataError: see :func:`image_size`.
    """
    with _opened(path) as image:
        return _orientation(image)


def load_image(path: Path) -> Image.Image:
    """The picture, decoded whole, upright, 8-bit RGB.

    Raises:
        DataError: missing, truncated, unreadable or too large, or of a mode whose white is not known; names the path.
    """
    with _opened(path) as image:
        image.load()
        return _rgb(ImageOps.exif_transpose(image), path)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except DataError:
        raise
    except _BOMBS as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise DataError(f"expected an image of at most {limit} pixels, got a larger one at {path}: scale it down or cut it up") from error
    except FileNotFoundError as error:
        hint = " (a link whose target is gone: import with --copy for a folder that travels)" if path.is_symlink() else ""
        raise DataError(f"expected an image file, got nothing at {path}{hint}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"expected an image file, got something else at {path}") from error
    except _ERRORS as error:
        reason = " ".join(str(error).split())
        raise DataError(f"expected a whole image, got one that fails with: {reason} ({path})") from error


def _orientation(image: Image.Image) -> int:
    # PIL turns TIFF itself; of a PNG without EXIF in its header it would decode all pixels to look behind them.
    if image.format == "TIFF" or (image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys()):
        return 1
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(2, 9) else 1


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((pixels * 255 + 32_767) // 65_535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(f"expected 8 or 16 bits a channel, got mode {image.mode!r}, whose white is not known ({path})")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")
