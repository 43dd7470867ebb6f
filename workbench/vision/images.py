"""Open images safely: raster formats only, whole, of a bearable size, upright, in RGB."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..errors import PromptError

MOST_PIXELS = 64_000_000  # 8,000 x 8,000, 192 MB in memory

# Pillow picks a decoder by a file's content, and some of its decoders start other programs (PostScript runs Ghostscript, which
# writes and deletes files). Only these raster formats are tried, whatever a file's name is.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_READ_AS = {*FORMATS, "MPO"}  # JPEG files with several frames, as many phones write them; opened by the JPEG decoder

# Pillow's decoders raise all of these for damaged files.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, RuntimeError, MemoryError, IndexError, TypeError, Image.DecompressionBombError,
)  # fmt: skip

Picture = Image.Image | str | os.PathLike


class ImageError(PromptError):
    """A picture that cannot be used: missing, damaged, cut short, too large."""


def open_image(picture: Picture) -> Image.Image:
    """The picture as RGB, turned as its EXIF orientation says.

    Raises:
        ImageError: naming the file and what is wrong with it.
    """
    if isinstance(picture, Image.Image):
        name, opened = (
            getattr(picture, "filename", "") or f"a picture of {picture.size[0]} x {picture.size[1]}",
            picture,
        )
        # An image that Pillow has opened is decoded when its pixels are first read, which happens here.
        if isinstance(picture, ImageFile.ImageFile) and picture.format not in _READ_AS:
            raise ImageError(
                f"{name} is a {picture.format} file; images are read from {', '.join(FORMATS)} files only: convert it first"
            )
    elif isinstance(picture, str | os.PathLike):
        name = os.fspath(picture)
        opened = _open(name)
    else:
        raise ImageError(f"{picture!r} is no picture: give a PIL image or the path of a file")
    width, height = opened.size
    if width * height > MOST_PIXELS:
        raise ImageError(
            f"{name} claims {width} x {height} pixels, over the limit of {MOST_PIXELS:,}: a decompression bomb, or a scan to "
            "make smaller first"
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
    except ImageError:  # a ValueError, too
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
            f"{name} ({size} bytes) is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file by its content, whatever its name says: it "
            "is damaged, or of another format and must be converted first"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is a decompression bomb: {error}") from error
    except _DECODER_ERRORS as error:
        raise ImageError(f"{name} cannot be opened: {error}") from error
