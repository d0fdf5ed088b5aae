"""Files as people and attackers have them: each is an image or an ImageError that names it."""

import struct
import time
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
import tifffile
from PIL import Image

from keras_medattn.data import headers, readers
from keras_medattn.data.headers import ImageError

TIFFS = {
    "RGB": (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"),
    "L": (None, "tiff_lzw", "jpeg"),
    "P": (None, "tiff_lzw"),
    "1": (None, "group4"),
    "CMYK": (None, "tiff_lzw"),
    "RGBA": (None, "tiff_adobe_deflate"),
}


@pytest.fixture
def file(tmp_path):
    """`file(bytes)` -> the path of a file without a suffix that holds them."""

    def write(data: bytes):
        (tmp_path / "file").write_bytes(data)
        return tmp_path / "file"

    return write


@pytest.fixture(scope="module")
def valid(picture, encode, tmp_path_factory) -> dict[str, bytes]:
    """Small whole files of each kind, for breaking."""
    small = picture.resize((12, 9))
    deep = np.random.default_rng(0).integers(0, 65536, (9, 12), np.uint16)
    path = tmp_path_factory.mktemp("tiff") / "deep.tif"
    tifffile.imwrite(path, deep, compression="lzw")
    return {
        "jpeg": encode(small, "JPEG"),
        "jpeg progressive": encode(small.convert("CMYK"), "JPEG", progressive=True),
        "png": encode(small, "PNG"),
        "png palette": encode(small.quantize(30), "PNG"),
        "png 16 bit": tf.io.encode_png(deep[..., None]).numpy(),
        "bmp": encode(small, "BMP"),
        "bmp palette": encode(small.quantize(30), "BMP"),
        "tiff": encode(small, "TIFF"),
        "tiff lzw": encode(small, "TIFF", compression="tiff_lzw"),
        "tiff 16 bit": path.read_bytes(),
    }


@pytest.mark.parametrize("mode", TIFFS)
def test_tiff_equals_pillow(mode, picture, encode, file):
    image = picture
    if mode == "RGBA":
        image = picture.copy()
        image.putalpha(picture.convert("L"))
    image = image.convert(mode)
    for compression in TIFFS[mode]:
        options = {"compression": compression} if compression else {}
        path = file(encode(image, "TIFF", **options))
        wanted = np.asarray(Image.open(path).convert("RGB"))
        np.testing.assert_array_equal(readers.read(path), wanted, err_msg=str(compression))


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "TIFF packed", "TIFF palette", "TIFF 16 bit"])
def test_exif_rotation_is_ignored_and_known(kind, turn, picture, encode, file):
    exif = Image.Exif()
    exif[headers.ORIENTATION] = turn
    image = picture.quantize(30) if "palette" in kind else picture
    options = {"compression": "tiff_lzw"} if "packed" in kind else {}
    plain, window = encode(image, kind.split()[0], **options), None
    turned = encode(image, kind.split()[0], exif=exif, **options)
    if "16" in kind:
        deep, window = np.asarray(picture.convert("L")).astype(np.uint16) * 200, (0, 65535)
        made = []
        for value in (1, turn):
            path = file(b"")
            tifffile.imwrite(path, deep, extratags=[(headers.ORIENTATION, "H", 1, value, True)])
            made.append(path.read_bytes())
        plain, turned = made
    assert not headers.read_header(plain).rotated
    assert headers.read_header(turned).rotated
    upright = readers.read(file(plain), window)
    assert upright.shape == (47, 61, 3)
    np.testing.assert_array_equal(readers.read(file(turned), window), upright)


def test_damaged_exif_does_not_matter(picture, encode, file):
    data = encode(picture, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    assert not headers.read_header(data).rotated
    np.testing.assert_array_equal(readers.read(file(data)), readers.read(file(encode(picture, "JPEG"))))


def test_a_name_does_not_tell_the_kind(picture, encode, tmp_path):
    path = tmp_path / "really a png.jpg"
    path.write_bytes(encode(picture, "PNG"))
    assert headers.read_header(path).kind == "png"
    np.testing.assert_array_equal(readers.read(path), np.asarray(picture))


def test_no_images(picture, encode, tmp_path):
    path = tmp_path / "image.png"
    for data, words in [
        (b"", r"image\.png: the file is empty \(0 bytes\)"),
        (b"a text, not a picture\n", r"image\.png: not an image of a known kind.*Received: b'a text, '"),
        (encode(picture.quantize(8), "GIF"), r"not an image of a known kind.*GIF89a|GIF87a"),
        (encode(picture, "WEBP"), "not an image of a known kind"),
        (b"\x89PNG\r\n\x1a\n", r"image\.png: damaged PNG header"),
        (b"\xff\xd8\xff", r"image\.png: damaged JPEG header"),
        (b"BM", r"image\.png: damaged BMP header"),
        (b"II*\0", r"image\.png: damaged TIFF header"),
    ]:
        path.write_bytes(data)
        with pytest.raises(ImageError, match=words):
            readers.read(path)
    for name, words in [
        ("absent.png", r"absent\.png: cannot be read \(No such file"),
        (".", r"cannot be read \(Is a directory"),
        ("null\0byte.png", "cannot be read .*null byte"),
    ]:
        with pytest.raises(ImageError, match=words):
            readers.read(tmp_path / name)


def test_kinds_that_are_refused(bmp, picture, encode, file, tmp_path):
    deep = np.zeros((4, 5), np.uint16)
    core = (
        b"BM" + struct.pack("<IHHI", 26 + 48, 0, 0, 26) + struct.pack("<IHHHH", 12, 4, 4, 1, 24) + b"\0" * 48
    )
    cases = [
        (encode(picture.convert("1"), "BMP"), None, "BMP images must have 8, 24 or 32 bits"),
        (bmp(4, 1, 8, 1, b"\4\1\0\1", b"\0" * 1024), None, "BMP images that are compressed"),
        (core, None, "of OS/2, are not supported"),
        (
            encode(picture, "TIFF", save_all=True, append_images=[picture]),
            None,
            "2 pages.*each page as a file",
        ),
        (deep.astype(np.float32), None, "1, 8 or 16 bits a channel. Received: 32"),
        (deep.astype(np.uint32), None, "1, 8 or 16 bits a channel. Received: 32"),
        (deep.astype(np.float16), (0, 1), "Received: MINISBLACK float16"),
        (deep, None, r"needs an intensity window. Set data.window = \[low, high\].*check"),
        (tf.io.encode_png(deep[..., None]).numpy(), None, "needs an intensity window"),
    ]
    for content, window, words in cases:
        path = tmp_path / "file"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            tifffile.imwrite(path, content)
        with pytest.raises(ImageError, match=words) as caught:
            readers.read(path, window)
        assert str(path) in str(caught.value)


def test_huge_images_are_refused_from_the_header(png, bmp, picture, encode, file, tmp_path):
    """200 megapixels in a PNG that is whole, and in the headers of the others."""
    jpeg = bytearray(encode(picture, "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 10000, 20000)
    tiff = encode(picture, "TIFF").replace(
        struct.pack("<HHIHH", 256, 4, 1, 61, 0), struct.pack("<HHII", 256, 4, 1, 20000)
    )
    tiff = tiff.replace(struct.pack("<HHIHH", 257, 4, 1, 47, 0), struct.pack("<HHII", 257, 4, 1, 10000))
    bombs = {
        "png": png(20000, 10000, 1, 0, (b"\0" * 2501) * 10000),
        "jpeg": bytes(jpeg),
        "bmp": bmp(20000, 10000, 24),
        "bmp from the top": bmp(20000, -10000, 24),
        "tiff": tiff,
    }
    readers.read(file(encode(picture, "PNG")))  # imports and traces
    headers.read_header(encode(picture, "TIFF"))
    for name, data in bombs.items():
        path = file(data)
        tracemalloc.start()
        start = time.perf_counter()
        with pytest.raises(
            ImageError, match=r"20000 x 10000 = 200,000,000 pixels; allowed are 1 to 100,000,000"
        ):
            readers.read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.perf_counter() - start < 1, name
        assert peak < 2_000_000, (name, peak)
    with pytest.raises(ImageError, match=r"4294967276 x 10 = .* allowed are 1 to"):
        readers.read(file(bmp(-20, 10, 24)))


def test_max_pixels_is_inclusive(picture, encode, file):
    path = file(encode(picture, "PNG"))
    assert readers.read(path, max_pixels=61 * 47).shape == (47, 61, 3)
    with pytest.raises(ImageError, match="61 x 47 = 2,867 pixels; allowed are 1 to 2,866"):
        readers.read(path, max_pixels=61 * 47 - 1)


def test_truncated_files_are_never_half_an_image(valid, file):
    """Cut anywhere: an error, or (where only an end mark is lost) the whole image."""
    for name, data in valid.items():
        whole = readers.read(file(data), (0, 65535))
        for length in sorted(
            {*range(0, 64, 5), *range(64, len(data), 37), *range(len(data) - 12, len(data))}
        ):
            try:
                got = readers.read(file(data[:length]), (0, 65535))
            except ImageError:
                continue
            np.testing.assert_array_equal(got, whole, err_msg=f"{name} cut at {length} of {len(data)}")


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_give_an_image_or_an_image_error(valid, file, seed):
    rng = np.random.default_rng(seed)
    refused = 0
    for data in valid.values():
        for _ in range(25):
            broken = bytearray(data)
            for at in rng.integers(4, len(data), rng.integers(1, 12)):
                broken[at] = rng.integers(256)
            if rng.random() < 0.3:  # a run of bytes lost, and random ones at the end
                at = int(rng.integers(4, len(data)))
                broken = broken[:at] + broken[at + int(rng.integers(1, 20)) :] + rng.bytes(20)
            try:
                got = readers.read(file(bytes(broken)), (0, 65535), max_pixels=100_000)
            except ImageError:
                refused += 1
                continue
            assert got.dtype == np.uint8
            assert got.shape[2] == 3
            assert 0 < got.shape[0] * got.shape[1] <= 100_000
    assert 25 < refused < 250


@pytest.mark.parametrize(
    "magic", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"II+\0"]
)
def test_random_bytes_after_a_magic(magic, file):
    rng = np.random.default_rng(0)
    for _ in range(40):
        with pytest.raises(ImageError):
            readers.read(file(magic + rng.bytes(int(rng.integers(0, 300)))), (0, 65535), max_pixels=100_000)
