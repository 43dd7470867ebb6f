"""Open images safely: raster formats only, complete, of limited size, upright, in RGB."""

from __future__ import annotations

import os
import warnings

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..errors import PromptError, reason
from ..schema import shortened
from .media_file import MediaFile, read_media

MAX_PIXELS = 64_000_000  # 8,000 x 8,000, 192 MB in memory

# Pillow picks a decoder by a file's content, and some of its decoders start other programs (PostScript runs Ghostscript, which
# writes and deletes files). Only these raster formats are tried, whatever the file name.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_READ_AS = {*FORMATS, "MPO"}  # JPEG files with several frames, as many phones write them; opened by the JPEG decoder

ImageLike = Image.Image | str | os.PathLike | MediaFile


class ImageError(PromptError):
    """An image that cannot be used: missing, damaged, cut short, too large."""


def open_image(image: ImageLike) -> Image.Image:
    """Return the image as RGB, rotated upright by its EXIF orientation; `image` is a PIL image, a path or a `MediaFile`.

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
    elif isinstance(image, str | os.PathLike | MediaFile):
        file = image if isinstance(image, MediaFile) else read_media(image, ImageError)
        name, opened = file.name, _open(file)
    else:
        raise ImageError(f"{shortened(image)} is not an image: give a PIL image or the path of a file")
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
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, AttributeError and others
        raise ImageError(f"{name} is damaged or cut short: {reason(error)}. Fetch it again") from error


def _open(file: MediaFile) -> Image.Image:
    name = file.name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by our own, lower limit
            return Image.open(file.open(), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} ({len(file.data)} bytes) is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file by its content, whatever its name: it "
            "is damaged, or in another format and must be converted first"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is a decompression bomb: {error}") from error
    except Exception as error:
        raise ImageError(f"{name} cannot be opened: {reason(error)}") from error
