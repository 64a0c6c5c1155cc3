"""The one road from an image file to pixels: bounded reading, decoding with Pillow, and one rule for every mode.

Every picture becomes upright 8-bit RGB. Transparent pixels are laid over white, whatever colour they hide. Levels above
8 bits, of grey or of colours, are scaled by their type (16 bits: divided by 256; 12 bits, where a TIFF says so: by 16),
unless none of them is above 4095 or above 255, which is how 12 and 8 bits are kept in 16. 32-bit integers may hold 0 to
255, or 0 to 65535 as 16 bits do; floating-point numbers 0 to 1 as well. Of an animation the first frame is taken.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image, UnidentifiedImageError

from smkd.data.formats import is_foreign, pillow_formats, suffix

if TYPE_CHECKING:  # whoever only copies images is not to wait for numpy
    import numpy as np
    from numpy.typing import NDArray

MOST_BYTES = 512 * 2**20
"""A file with more bytes is not read."""
MOST_PIXELS = 178_956_970
"""An image with more pixels is not decoded; the number from which Pillow sees an attack."""
BACKGROUND = (255, 255, 255, 255)
"""What is seen through transparent pixels."""

STRIP = 4 * 2**20
"""So many pixels of an image are converted at a time."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What undoes each of EXIF's orientations."""
BITS_PER_SAMPLE, PHOTOMETRIC, PLANES, WHITE_IS_ZERO, SEPARATE = 258, 262, 284, 0, 2
"""Tags of a TIFF file, and a value of the second and of the third."""
DEEP = ";16"
"""In Pillow's names for how pixels are stored: 16 bits a level, of which it gives the upper 8, but for grey alone."""
END_OF_CODESTREAM = b"\xff\xd9"
"""Ends a JPEG 2000 image; its other bytes never are these two."""
KEY_SCALE = {"1": 255, "L;2": 85, "L;4": 17}
"""How Pillow enlarges the levels of PNG's small grey depths, but not its transparent level."""


class TooLargeError(ValueError):
    """An image has more pixels than are decoded."""


def read_file(path: str | Path) -> bytes:
    """An image file as it is stored.

    Raises:
        OSError: it cannot be opened, or is a folder.
        ValueError: it is a pipe or a device, too long, or of a kind that Pillow cannot read here.
    """
    if is_foreign(os.fspath(path)):
        raise ValueError(f"Pillow cannot read {suffix(os.fspath(path))} files here")
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("a pipe or device, not a file")
        check_length(status.st_size)
        return file.read(status.st_size)


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe before anybody writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def check_length(count: int) -> None:
    """Raise `ValueError` if a file of so many bytes is not read."""
    if count > MOST_BYTES:
        raise ValueError(f"the file has {count} bytes; at most {MOST_BYTES} are read")


def decode(data: bytes, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Decode an image file to its last row, as RGB and upright.

    Raises:
        OSError, ValueError: not an image, cut short, too large, or of levels without a rule; says which.
    """
    with _opened(data, most_pixels) as image:
        return _upright(image)


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Levels of an RGB image, uint8 [height, width, 3], that may be written to.

    Row by row, as it were: Pillow's own conversion holds two further copies of all pixels for a moment.
    """
    import numpy as np

    height, width = image.height, image.width
    rows = max(1, STRIP // width)
    if rows >= height:
        return np.array(image)
    levels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        levels[top : top + rows] = np.asarray(image.crop((0, top, width, min(top + rows, height))))
    return levels


def shape(data: bytes, most_pixels: int = MOST_PIXELS) -> tuple[int, int]:
    """Height and width of `decode(data)`, from the header alone; raises as it does."""
    with _opened(data, most_pixels) as image:
        # Pillow turns a TIFF itself, and says its size accordingly
        lies = image.format != "TIFF" and _orientation(image) >= 5  # by a quarter
        return (image.width, image.height) if lies else (image.height, image.width)


def as_rgb(image: Image.Image) -> Image.Image:
    """What `decode` makes of a Pillow image; raises as it does."""
    with _explained(MOST_PIXELS):
        _check_size(image, MOST_PIXELS)
        return _upright(image)


@contextmanager
def _opened(data: bytes, most_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read; errors inside become those of `decode`."""
    if not data:
        raise ValueError("the file is empty")
    check_length(len(data))
    with _explained(most_pixels, data), Image.open(io.BytesIO(data), formats=pillow_formats()) as image:
        _check_size(image, most_pixels)
        if image.format == "JPEG2000" and END_OF_CODESTREAM not in data:
            raise ValueError("the file is cut short")  # which its reader does not always see
        yield image


@contextmanager
def _explained(most_pixels: int, data: bytes = b"") -> Iterator[None]:
    """Makes errors of two kinds of all that Pillow's readers raise on broken files: SyntaxError, TypeError and more."""
    try:
        yield
    except UnidentifiedImageError as error:
        brand = data[8:12].decode("ascii", "replace").strip() if data[4:8] == b"ftyp" else ""
        raise ValueError(f"not an image of a known format{f' ({brand})' if brand else ''}") from error
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"too large; {_at_most(most_pixels)}") from error
    except MemoryError as error:
        raise ValueError("decoding it takes more memory than there is") from error
    except (OSError, TooLargeError):
        raise
    except Exception as error:
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error


def _check_size(image: Image.Image, most_pixels: int) -> None:
    if image.width * image.height > most_pixels:
        raise TooLargeError(f"too large: {image.width} x {image.height} pixels; {_at_most(most_pixels)}")


def _at_most(pixels: int) -> str:
    return f"at most {pixels / 1e6:.0f} million pixels are taken"


def _upright(image: Image.Image) -> Image.Image:
    """An opened image as RGB, as the camera was held where the file says so."""
    raw = _stored_as(image)
    data = _whole(image) if DEEP in raw and not image.mode.startswith("I") else None
    image.load()
    orientation = _orientation(image)
    if data is not None and _brightest(image) < 16:
        image, raw = _of_both_bytes(image, raw, data), ""
    seen = _seen(image, raw)
    return seen if orientation == 1 else seen.transpose(TURNS[orientation])


def _stored_as(image: Image.Image) -> str:
    """How the file of an image that is not loaded yet stores its pixels, in Pillow's word; empty if it has none."""
    tiles = getattr(image, "tile", ())
    if not tiles:
        return ""
    codec, arguments = tiles[0][0], tiles[0][3]
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    if codec == "SGI16":
        return f"{raw}{DEEP}B"
    if _tag(image, PLANES) == SEPARATE and codec == "raw" and _tag(image, BITS_PER_SAMPLE) == 16:
        raise ValueError(f"image of mode {image.mode} with 16 bits in separate planes, which Pillow reads wrongly")
    return raw if isinstance(raw, str) else ""


def _whole(image: Image.Image) -> bytes:
    """The file of an image that is not loaded yet."""
    file = image.fp  # type: ignore[attr-defined]
    place = file.tell()
    file.seek(0)
    data: bytes = file.read()
    file.seek(place)
    return data


def _brightest(image: Image.Image) -> int:
    """The largest level of its colours."""
    return max(high for band, (_, high) in zip(image.getbands(), _extrema(image), strict=True) if band != "A")


def _extrema(image: Image.Image) -> list[tuple[int, int]]:
    return [band.getextrema() for band in image.split()]  # type: ignore[misc]


def _of_both_bytes(image: Image.Image, raw: str, data: bytes) -> Image.Image:
    """An image of 16 bits, of which Pillow gave the upper byte, where 12 or 8 bits are kept in them.

    Raises:
        ValueError: Pillow cannot give the lower byte.
    """
    import numpy as np

    order = raw[-1].replace("N", "L" if sys.byteorder == "little" else "B")
    other = raw[:-1] + ("B" if order == "L" else "L")
    if image.format not in ("PNG", "TIFF") or raw.startswith("L"):
        reason = "none of its values is above 4095 of 65535, and Pillow reads their upper 8 bits alone"
        raise ValueError(f"image of mode {raw}: {reason}; save it as 8 bits")
    with Image.open(io.BytesIO(data), formats=[image.format]) as lower:
        # the bytes of each number in the other order, of which Pillow takes the upper one again
        lower.tile = [_stored_otherwise(tile, other) for tile in lower.tile]
        lower.load()
        values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)
    colours = [number for number, band in enumerate(image.getbands()) if band != "A"]
    shift = _kept_in_16(values[..., colours].max())
    levels = values >> shift
    if len(colours) < values.shape[-1]:
        levels[..., -1] = values[..., -1] >> _kept_in_16(values[..., -1].max())
    made = Image.frombytes(image.mode, image.size, levels.astype(np.uint8).tobytes())
    if isinstance(key := image.info.get("transparency"), tuple):
        made.info["transparency"] = tuple(level >> shift for level in key)
    return made


def _stored_otherwise(tile: Any, raw: str) -> Any:
    """A part of a file with another word for how it stores its pixels."""
    changed = (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw
    # a plain tuple in older versions
    return tile._replace(args=changed) if hasattr(tile, "_replace") else (*tile[:3], changed)


def _kept_in_16(highest: int) -> int:
    """By how many bits levels of 16 bits are shifted to have 8, from the highest of them."""
    return 0 if highest <= 255 else 4 if highest <= 4095 else 8


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts; 1 where nothing is said, or nothing that can be read."""
    try:
        said = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata of a good picture
        return 1
    return int(said) if said in range(1, 9) else 1


def _seen(image: Image.Image, raw: str) -> Image.Image:
    """A loaded image as RGB over the background.

    Args:
        raw: how a PNG stores its pixels, as Pillow calls it.
    """
    key = image.info.get("transparency") if image.mode in ("1", "L", "P", "RGB") else None
    if image.mode == "RGB" and key is None:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _of_levels(image)
    if image.mode == "LAB":
        return _of_lab(image)
    if image.mode in ("La", "RGBa"):  # colours already multiplied by alpha
        image = image.convert(image.mode[:-1] + "A")
    palette = image.palette.mode if image.mode == "P" and image.palette is not None else ""
    if key is None and "A" not in image.mode + palette:
        return image.convert("RGB")
    if raw in KEY_SCALE and isinstance(key, int):
        image = _with_key(image, key * KEY_SCALE[raw])
    if raw == "RGB;16B" and isinstance(key, tuple):
        image = _with_key(image, tuple(level >> 8 for level in key))
    return _over_background(image if image.mode == "RGBA" else image.convert("RGBA"))


def _with_key(image: Image.Image, key: int | tuple[int, ...]) -> Image.Image:
    """A copy with another transparent level or colour."""
    image = image.copy()
    image.info["transparency"] = key
    return image


def _over_background(image: Image.Image) -> Image.Image:
    """RGBA without its transparency."""
    low, _ = image.getchannel("A").getextrema()
    if low == 255:
        return image.convert("RGB")
    seen = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        seen.paste(Image.alpha_composite(Image.new("RGBA", part.size, BACKGROUND), part).convert("RGB"), (0, top))
    return seen


def _of_levels(image: Image.Image) -> Image.Image:
    """RGB of one channel of more than 8 bits."""
    import numpy as np

    values = np.asarray(image)
    levels = _scaled(values, image)
    if levels.min() == levels.max() and values.min() != values.max():
        raise ValueError(
            f"grey image of mode {image.mode}: its values, from {values.min()} to {values.max()}, all fall on one of "
            "256 levels; stretch them first"
        )
    if _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 255 - levels
    key = image.info.get("transparency")
    if isinstance(key, int):
        levels = np.where(values == key, np.uint8(BACKGROUND[0]), levels)
    return Image.fromarray(levels).convert("RGB")


def _scaled(values: NDArray[Any], image: Image.Image) -> NDArray[np.uint8]:
    """Levels from 0 to 255, by the rules above."""
    import numpy as np

    low, high = values.min(), values.max()
    if image.mode.startswith("I;16") and _tag(image, BITS_PER_SAMPLE) == 12:
        values = np.minimum(values >> 4, 255)
    elif not (low >= 0 and high <= 65535):  # also where one is not a number
        raise ValueError(f"grey image of mode {image.mode}: no rule for values from {low} to {high}; save it as 8 bits")
    elif image.mode == "F" and high <= 1:
        values = np.rint(values * np.float32(255))
    elif image.mode == "F" and high <= 255:
        values = np.rint(values)
    else:
        values = values.astype(np.uint16) >> _kept_in_16(high)
    levels: NDArray[np.uint8] = values.astype(np.uint8)
    return levels


def _tag(image: Image.Image, number: int) -> Any:
    """Value of a tag of a TIFF file, the first of several; none if it is not there, or another format."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value


def _of_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms  # compiled with a library of its own

    rule = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted = ImageCms.applyTransform(image, rule)
    assert converted is not None  # not in place
    return converted
