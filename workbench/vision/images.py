"""Open images safely: raster formats only, complete, of limited size, upright, in RGB."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..errors import PromptError

MAX_PIXELS = 64_000_000  # 8,000 x 8,000, 192 MB in memory

# Pillow picks a decoder by a file's content, and some of its decoders start other programs (PostScript runs Ghostscript, which
# writes and deletes files). Only these raster formats are tried, whatever the file name.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_READ_AS = {*FORMATS, "MPO"}  # JPEG files with several frames, as many phones write them; opened by the JPEG decoder

# Pillow's decoders raise all of these for damaged files.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, RuntimeError, MemoryError, IndexError, TypeError, Image.DecompressionBombError,
)  # fmt: skip

ImageLike = Image.Image | str | os.PathLike


class ImageError(PromptError):
    """An image that cannot be used: missing, damaged, cut short, too large."""


def open_image(image: ImageLike) -> Image.Image:
    """Return the image as RGB, rotated upright by its EXIF orientation; `image` is a PIL image or the path of a file.

    Raises:
        ImageError: the message names the file and what is wrong with it.
    """
    if isinstance(image, Image.Image):
        name, opened = (
            getattr(image, "filename", "") or f"an image of {image.size[0]} x {image.size[1]}",
            image,
        )
        # An image that Pillow has opened is decoded when its pixels are first read, which happens here.
        if isinstance(image, ImageFile.ImageFile) and image.format not in _READ_AS:
            raise ImageError(
                f"{name} is a {image.format} file; images are read from {', '.join(FORMATS)} files only: convert it first"
            )
    elif isinstance(image, str | os.PathLike):
        name = os.fspath(image)
        opened = _open(name)
    else:
        raise ImageError(f"{image!r} is not an image: give a PIL image or the path of a file")
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} claims {width} x {height} pixels, over the limit of {MAX_PIXELS:,}: a decompression bomb, or a scan that "
            "must be made smaller first"
        )
    if not width or not height:
        raise ImageError(f"{name} has no pixels ({width} x {height})")
    try:
        upright = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I;16"):  # `convert` would clip 16 bits to 8 instead of scaling them
            upright = upright.point(lambda level: level / 257).convert("L")
        if upright.mode in ("I", "F"):
            raise ImageError(
                f"{name} has pixels of mode {upright.mode!r}, whose range is not known: convert it to 8 bits first"
            )
        return upright.convert("RGB")
    except ImageError:  # it is a ValueError, too
        raise
    except _DECODER_ERRORS as error:
        raise ImageError(f"{name} is damaged or cut short: {error}. Fetch it again") from error


def _open(name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by our own, lower limit
            return Image.open(name, formats=FORMATS)
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist") from error
    except UnidentifiedImageError as error:
        size = Path(name).stat().st_size
        raise ImageError(
            f"{name} ({size} bytes) is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file by its content, whatever its name: it "
            "is damaged, or in another format and must be converted first"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is a decompression bomb: {error}") from error
    except _DECODER_ERRORS as error:
        raise ImageError(f"{name} cannot be opened: {error}") from error
