"""Every kind of image becomes upright RGB of 8 bits by a stated rule, or is refused in one line; nothing hangs."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from made_images import encode
from smkd.classify.pictures import Pictures
from smkd.data import decoding
from smkd.data.augment import resize_center_crop
from smkd.data.decoding import as_rgb, decode, read_file, shape
from smkd.errors import DataError

GREY = np.random.default_rng(0).integers(0, 256, (20, 25), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (20, 25, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(
    order: str, values: np.ndarray, *, bits: int, white_is_zero: bool = False, data: bytes | None = None,
    photometric: int = 1, planes: int = 1,
) -> bytes:  # fmt: skip
    """An uncompressed TIFF; `order` is '<' or '>'."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes() if data is None else data
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    channels = values.shape[2] if values.ndim == 3 else 1
    tags = [
        (256, values.shape[1]), (257, values.shape[0]), (258, bits), (259, 1),
        (262, 0 if white_is_zero else photometric), (273, 0), (277, channels), (278, values.shape[0]),
        (279, len(data)), (284, planes), (339, sample_format),
    ]  # fmt: skip
    several = {258: [bits] * channels, 339: [sample_format] * channels} if channels > 1 else {}
    if channels in (2, 4) and photometric < 5:
        tags[10:10] = [(338, 2)]
    start = 8 + 2 + 12 * len(tags) + 4
    extra, rows = b"", b""
    for tag, value in tags:
        if tag in several:
            place = start + len(extra)
            extra += struct.pack(f"{order}{channels}H", *several[tag])
            rows += struct.pack(f"{order}HHII", tag, 3, channels, place)
        elif tag == 273:
            rows += struct.pack(f"{order}HHII", tag, 4, 1, start + 2 * channels * len(several))
        else:
            rows += struct.pack(f"{order}HHII", tag, 4, 1, value)
    begin = b"II" if order == "<" else b"MM"
    head = begin + struct.pack(f"{order}HIH", 42, 8, len(tags)) + rows + struct.pack(f"{order}I", 0)
    return head + extra + data


def png(
    width: int, depth: int, colour: int, row: bytes, transparent: bytes = b"", palette: bytes = b"", height: int = 1
) -> bytes:
    """A PNG, with a tRNS chunk where there is one; `row` are all rows, each with its filter if there are several."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *([(b"PLTE", palette)] if palette else [])]
    parts += [(b"tRNS", transparent)] if transparent else []
    parts += [(b"IDAT", zlib.compress(row if height > 1 else b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def sixteen(factor: int = 257) -> np.ndarray:
    return GREY.astype(np.uint16) * factor


def packed_12_bits() -> bytes:
    """Rows of 12 bits a level, each filled to a whole byte."""
    rows = ["".join(format(level << 4, "012b") for level in row) + "0000" for row in GREY.tolist()]
    return b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)


DEEP = {
    "PNG": lambda: encode(sixteen(), "PNG"),
    "TIFF": lambda: encode(sixteen(), "TIFF"),
    "TIFF, compressed": lambda: encode(sixteen(), "TIFF", compression="tiff_lzw"),
    "TIFF, little": lambda: tiff("<", sixteen(), bits=16),
    "TIFF, big": lambda: tiff(">", sixteen(), bits=16),
    "TIFF, white is zero": lambda: tiff("<", 65535 - sixteen(), bits=16, white_is_zero=True),
    "TIFF, 12 bits": lambda: tiff("<", GREY, bits=12, data=packed_12_bits()),
    "TIFF, int32": lambda: tiff("<", sixteen().astype(np.int32), bits=32),
    "TIFF, int32, big": lambda: tiff(">", sixteen().astype(np.int32), bits=32),
    "TIFF, float 0 to 1": lambda: tiff("<", GREY.astype(np.float32) / 255, bits=32),
    "TIFF, float 0 to 255, big": lambda: tiff(">", GREY.astype(np.float32), bits=32),
    "TIFF, float 0 to 65535": lambda: tiff("<", sixteen().astype(np.float32), bits=32),
    "8 bits in 16": lambda: tiff("<", GREY.astype(np.uint16), bits=16),
    "12 bits in 16": lambda: tiff(">", sixteen(16), bits=16),
    "12 bits in 16, PNG": lambda: encoded(Image.fromarray(sixteen(16)), "PNG"),
    "8 bits in int16": lambda: tiff("<", GREY.astype(np.int16), bits=16),
    "PGM": lambda: b"P5 25 20 65535\n" + sixteen().astype(">u2").tobytes(),
    "PGM, plain": lambda: b"P2 25 20 510\n" + b" ".join(str(2 * v).encode() for v in GREY.ravel().tolist()) + b"\n",
    "PGM, 255": lambda: b"P5 25 20 255\n" + GREY.tobytes(),
}


@pytest.mark.parametrize("kind", DEEP)
def test_grey_above_8_bits_is_the_picture_of_8_bits(kind: str) -> None:
    data = DEEP[kind]()
    np.testing.assert_array_equal(np.asarray(decode(data)), np.repeat(GREY[..., None], 3, axis=2))
    assert shape(data) == (20, 25)


def deep_png(values: np.ndarray, colour: int, transparent: bytes = b"") -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], 16, colour, rows, transparent, height=len(values))


def with_alpha(colour: np.ndarray) -> np.ndarray:
    alpha = np.where(GREY > 100, 255, 0).astype(np.uint8)
    return np.concatenate([colour, alpha[..., None]], axis=-1)


KEPT = {"16 bits": 257, "12 bits in 16": 16, "8 bits in 16": 1}
COLOURED = {
    "PNG": lambda factor: deep_png(COLOUR.astype(np.uint16) * factor, 2),
    "TIFF, little": lambda factor: tiff("<", COLOUR.astype(np.uint16) * factor, bits=16, photometric=2),
    "TIFF, big": lambda factor: tiff(">", COLOUR.astype(np.uint16) * factor, bits=16, photometric=2),
    "TIFF, compressed": lambda factor: compressed(tiff("<", COLOUR.astype(np.uint16) * factor, bits=16, photometric=2)),
}


def compressed(data: bytes) -> bytes:
    """A TIFF of 16-bit colours by Adobe's deflate, which libtiff reads."""
    head, count = bytearray(data), struct.unpack("<H", data[8:10])[0]
    tags = {struct.unpack("<H", head[at : at + 2])[0]: at for at in range(10, 10 + 12 * count, 12)}
    start = struct.unpack("<I", head[tags[273] + 8 : tags[273] + 12])[0]
    packed = zlib.compress(data[start:])
    head[tags[259] + 8 : tags[259] + 12] = struct.pack("<I", 8)
    head[tags[279] + 8 : tags[279] + 12] = struct.pack("<I", len(packed))
    return bytes(head[:start]) + packed


@pytest.mark.parametrize("bits", KEPT)
@pytest.mark.parametrize("kind", COLOURED)
def test_colours_of_16_bits_are_the_picture_of_8_bits(kind: str, bits: str) -> None:
    data = COLOURED[kind](KEPT[bits])
    np.testing.assert_array_equal(np.asarray(decode(data)), COLOUR)
    np.testing.assert_array_equal(np.asarray(as_rgb(Image.open(io.BytesIO(data)))), COLOUR)


@pytest.mark.parametrize("bits", KEPT)
def test_transparency_of_16_bits(bits: str) -> None:
    factor = KEPT[bits]
    both = with_alpha(COLOUR)
    expected = np.where(both[..., 3:] == 255, COLOUR, 255)
    deep = both.astype(np.uint16) * factor
    full = deep.copy()
    full[..., 3] = both[..., 3].astype(np.uint16) * 257  # alpha keeps all its bits where colours do not
    for values in (deep, full):
        for data in (deep_png(values, 6), tiff(">", values, bits=16, photometric=2)):
            np.testing.assert_array_equal(np.asarray(decode(data)), expected)
    colour = tuple(int(level) for level in COLOUR[3, 4])
    keyed = deep_png(COLOUR.astype(np.uint16) * factor, 2, struct.pack(">3H", *(factor * level for level in colour)))
    seen = np.asarray(decode(keyed))
    assert (seen[3, 4] == 255).all()
    np.testing.assert_array_equal(seen[0], COLOUR[0])
    # grey with alpha, of which Pillow does not give the lower bytes
    grey = with_alpha(GREY[..., None]).astype(np.uint16) * factor
    if bits == "16 bits":
        shown = np.where(GREY > 100, GREY, 255)
        np.testing.assert_array_equal(np.asarray(decode(deep_png(grey, 4)))[..., 0], shown)
    else:
        with pytest.raises(ValueError, match=r"mode LA;16B: none of its values is above 4095 of 65535"):
            decode(deep_png(grey, 4))


def test_planes_of_16_bits_are_refused() -> None:
    values = np.moveaxis(COLOUR, -1, 0).astype(np.uint16) * 257
    data = tiff("<", COLOUR.astype(np.uint16), bits=16, photometric=2, planes=2, data=values.astype("<u2").tobytes())
    with pytest.raises(ValueError, match="mode RGB with 16 bits in separate planes"):
        decode(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_large_picture_is_converted_in_parts(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(COLOUR if mode == "RGB" else with_alpha(COLOUR))
    whole = decode(encoded(image, "PNG"))
    monkeypatch.setattr(decoding, "STRIP", 70)
    parts = decode(encoded(image, "PNG"))
    np.testing.assert_array_equal(decoding.pixels(parts), np.asarray(whole))
    assert decoding.pixels(parts).flags.writeable


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_levels_of_a_pillow_image_in_any_byte_order(mode: str) -> None:
    order = ">" if mode == "I;16B" else "<" if mode == "I;16L" else "="
    image = Image.frombytes(mode, (25, 20), sixteen().astype(np.dtype(np.uint16).newbyteorder(order)).tobytes())
    np.testing.assert_array_equal(np.asarray(as_rgb(image))[..., 0], GREY)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[-3, 5]], np.int32), "mode I: no rule for values from -3 to 5"),
        (np.array([[0, 1 << 20]], np.int32), "mode I: no rule for values from 0 to 1048576"),
        (np.array([[0, np.nan]], np.float32), "mode F: no rule for values from nan to nan"),
        (np.array([[0, np.inf]], np.float32), "mode F: no rule"),
        (np.array([[-0.5, 0.5]], np.float32), "mode F: no rule for values from -0.5 to 0.5"),
        (
            np.array([[4900, 5000]], np.uint16),
            "mode I;16: its values, from 4900 to 5000, all fall on one of 256 levels",
        ),
    ],
)
def test_levels_without_a_rule_are_refused_by_name(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(encode(values, "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "TGA", "JPEG2000", "ICO", "DDS", "AVIF"])
def test_what_transparent_pixels_hide_is_not_seen(kind: str) -> None:
    alpha = np.full((32, 32), 255, np.uint8)
    alpha[:, :16] = 0
    options: dict[str, object] = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    options |= {"sizes": [(32, 32)]} if kind == "ICO" else {"quality": 100} if kind == "AVIF" else {}
    seen = []
    for colour in ((255, 0, 255), (0, 90, 0)):
        pixels = np.full((32, 32, 4), (10, 20, 30, 0), np.uint8)
        pixels[:, :16, :3] = colour
        pixels[..., 3] = alpha
        seen.append(np.asarray(decode(encode(pixels, kind, **options))).astype(int))
    if kind != "AVIF":  # whose colours are never exact
        np.testing.assert_array_equal(seen[0], seen[1])
    assert (seen[0][:, :8] == 255).all()
    assert np.abs(seen[0][:, 24:] - (10, 20, 30)).max() <= (4 if kind == "AVIF" else 0)


def test_grey_with_alpha_and_palettes() -> None:
    grey = np.stack([GREY, np.where(GREY > 100, 255, 0).astype(np.uint8)], axis=-1)
    expected = np.where(GREY > 100, GREY, 255)
    image = Image.frombytes("LA", (25, 20), grey.tobytes())
    for mode in ("LA", "La"):
        np.testing.assert_array_equal(np.asarray(as_rgb(image.convert(mode)))[..., 0], expected)
    np.testing.assert_array_equal(np.asarray(decode(encode(image, "PNG")))[..., 2], expected)
    palette = Image.fromarray(GREY % 3).convert("P")
    palette.putpalette([1, 2, 3, 40, 50, 60, 70, 80, 90])
    for kind, transparency in (("PNG", b"\xff\x00\xff"), ("PNG", 1), ("GIF", 1)):
        levels = np.asarray(decode(encode(palette, kind, transparency=transparency)))
        np.testing.assert_array_equal(levels[GREY % 3 == 1], 255)
        np.testing.assert_array_equal(levels[GREY % 3 == 2], np.tile([70, 80, 90], ((GREY % 3 == 2).sum(), 1)))
    with_alpha = palette.convert("PA")
    with_alpha.putalpha(Image.fromarray(np.where(GREY % 3 == 1, 0, 255).astype(np.uint8)))
    assert with_alpha.mode == "PA"
    np.testing.assert_array_equal(np.asarray(as_rgb(with_alpha))[GREY % 3 == 1], 255)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(2, 1, 0, b"\x40", b"\0\0"), [255, 255]),
        (png(2, 1, 0, b"\x40", b"\0\1"), [0, 255]),
        (png(4, 2, 0, b"\x1b", b"\0\2"), [0, 85, 255, 255]),
        (png(2, 4, 0, b"\x3c", b"\0\x03"), [255, 204]),
        (png(3, 8, 0, b"\x05\x06\x07", b"\0\x06"), [5, 255, 7]),
        (png(3, 16, 0, struct.pack(">3H", 1000, 1001, 9000), struct.pack(">H", 1001)), [3, 255, 35]),
        (png(2, 8, 2, bytes([1, 2, 3, 1, 2, 4]), struct.pack(">3H", 1, 2, 3)), [255, 1]),
        (png(2, 16, 2, struct.pack(">6H", 300, 600, 900, 5000, 1, 1), struct.pack(">3H", 300, 600, 900)), [255, 19]),
        (png(3, 8, 3, b"\0\1\2", b"\xff\0", bytes([9, 9, 9, 8, 8, 8, 7, 7, 7])), [9, 255, 7]),
    ],
    ids=["1 bit, black", "1 bit, white", "2 bits", "4 bits", "8 bits", "16 bits", "RGB", "RGB of 16 bits", "palette"],
)
def test_one_transparent_level_or_colour_of_any_depth(data: bytes, expected: list[int]) -> None:
    assert np.asarray(decode(data))[0, :, 0].tolist() == expected


def test_opaque_pictures_are_as_pillow_has_them() -> None:
    image = Image.fromarray(COLOUR)
    for mode in ("1", "L", "P", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", "HSV"):
        np.testing.assert_array_equal(np.asarray(as_rgb(image.convert(mode))), image.convert(mode).convert("RGB"))
    rule = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    smooth = image.resize((6, 6), Image.Resampling.BOX)
    lab = ImageCms.applyTransform(smooth, rule)
    assert np.abs(np.asarray(decode(encode(lab, "TIFF"))).astype(int) - np.asarray(smooth)).max() < 8
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        frames = [Image.fromarray(np.full((9, 8, 3), level, np.uint8)) for level in (40, 200)]
        options = {"lossless": True} if kind == "WEBP" else {}
        first = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options))
        np.testing.assert_array_equal(np.asarray(first), np.asarray(frames[0]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "TGA", "PCX", "JPEG2000", "AVIF"])
def test_a_file_that_is_cut_short_is_never_another_picture(kind: str) -> None:
    data = encode(COLOUR, kind)
    whole = np.asarray(decode(data))
    for length in range(1, len(data), 3):
        try:
            cut = decode(data[:length])
        except (OSError, ValueError) as error:
            assert str(error)  # noqa: PT017
        else:
            np.testing.assert_array_equal(np.asarray(cut), whole)


def test_what_is_no_bounded_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / "long.jpg"
    with long.open("wb") as file:
        file.truncate(decoding.MOST_BYTES + 1)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "photo.CR2").write_bytes(encode(COLOUR, "TIFF"))
    reasons = {
        "long.jpg": "the file has 536870913 bytes; at most 536870912 are read",
        "pipe.jpg": "a pipe or device, not a file",
        "zero.jpg": "a pipe or device, not a file", "folder.jpg": "Is a directory",
        "photo.CR2": r"Pillow cannot read \.cr2 files here",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises((OSError, ValueError), match=reason):
            read_file(tmp_path / name)
        with pytest.raises(DataError, match=f"cannot read image '.*{name}': {reason}"):
            Pictures([tmp_path / name]).load(0)
    monkeypatch.setattr(decoding, "MOST_PIXELS", 400)
    with pytest.raises(ValueError, match="too large: 25 x 20 pixels; at most 0 million"):
        decode(encode(COLOUR, "PNG"), decoding.MOST_PIXELS)
    with pytest.raises(ValueError, match="too large"):
        as_rgb(Image.fromarray(COLOUR))
    with pytest.raises(ValueError, match=r"not an image of a known format \(heic\)"):
        decode(b"\0\0\0\x18ftypheic" + bytes(20))
    with pytest.raises(ValueError, match="not an image of a known format"):  # a program in disguise
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")


@pytest.mark.parametrize(("height", "width"), [(1, 2_000), (2_000, 1), (3, 100), (7, 333), (40, 2_000)])
def test_a_thin_image_is_cut_first_with_the_same_result(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (3, height, width), dtype=np.uint8))
    cut = resize_center_crop(image, 36, 32)
    monkeypatch.setattr("smkd.data.augment.THIN", 1e9)
    whole = resize_center_crop(image, 36, 32)
    assert cut.shape == whole.shape == (3, 32, 32)
    assert (cut.int() - whole.int()).abs().max() <= 1
    assert (cut != whole).float().mean() < 0.001


def test_a_thin_image_takes_no_more_memory_than_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    resize = Image.Image.resize

    def noted(self: Image.Image, size: tuple[int, int], *args: object, **kwargs: object) -> Image.Image:
        sizes.append(size)
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", noted)
    assert resize_center_crop(torch.zeros(3, 20_000, 1, dtype=torch.uint8), 360, 320).shape == (3, 320, 320)
    assert sizes == [(320, 320)]
