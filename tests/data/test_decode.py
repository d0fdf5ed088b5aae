"""The one decoder: pixels as Pillow's, or as written by hand, and the same in an exported SavedModel."""

import io
import struct

import imagecodecs
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_medattn.data import decode, pipeline, readers
from keras_medattn.export.signatures import Exported

JPEG = {
    "baseline": {},
    "progressive": {"progressive": True},
    "4:4:4": {"subsampling": 0, "quality": 95},
    "4:2:2": {"subsampling": 1},
    "coarse": {"quality": 20},
    "restart markers": {"restart_marker_blocks": 2},
}


@pytest.fixture(scope="module")
def files(picture, encode) -> dict[str, bytes]:
    """The picture in every kind, depth and colour mode that Pillow reads rightly."""
    alpha = picture.copy()
    alpha.putalpha(picture.convert("L"))
    made = {}
    for mode, image in {"RGB": picture, "L": picture.convert("L"), "CMYK": _inks(picture)}.items():
        for name, options in JPEG.items():
            made[f"jpeg {mode} {name}"] = encode(image, "JPEG", **options)
    inverted = 255 - np.asarray(_inks(picture))
    made["jpeg CMYK as YCCK"] = imagecodecs.jpeg8_encode(
        inverted, level=90, colorspace="CMYK", outcolorspace="YCCK"
    )
    modes = {
        "RGB": picture,
        "L": picture.convert("L"),
        "1": picture.convert("1"),
        "RGBA": alpha,
        "LA": alpha.convert("LA"),
        "P": picture.quantize(200),
        "P of 4 bits": picture.quantize(13),
    }
    for mode, image in modes.items():
        made[f"png {mode}"] = encode(image, "PNG", **({"bits": 4} if "4" in mode else {}))
    made["png P transparent"] = encode(picture.quantize(50), "PNG", transparency=3)
    made["png L transparent"] = encode(picture.convert("L"), "PNG", transparency=100)
    made["png RGB transparent"] = encode(picture, "PNG", transparency=(1, 2, 3))
    for mode in ("RGB", "L", "RGBA", "P", "P of 4 bits"):
        made[f"bmp {mode}"] = encode(modes[mode], "BMP")
    return made


def _inks(picture: Image.Image) -> Image.Image:
    """CMYK with black drawn out of the colours, as print shops do (Pillow's own has none)."""
    colours = 255 - np.asarray(picture)
    black = colours.min(axis=-1, keepdims=True) // 2
    return Image.fromarray(np.concatenate([colours - black, black], axis=-1), "CMYK")


def _expected(data: bytes, towards: tuple[int, int] | None = None) -> np.ndarray:
    """Pillow's pixels; of inks the product of what they let through, rounded down (Pillow rounds)."""
    image = Image.open(io.BytesIO(data))
    if towards:
        image.draft(image.mode, (2 * towards[1], 2 * towards[0]))
    if image.mode != "CMYK":
        return np.asarray(image.convert("RGB"))
    light = 255 - np.asarray(image).astype(int)
    return (light[..., :3] * light[..., 3:] // 255).astype(np.uint8)


def test_pixels_equal_pillows_bit_for_bit(files, tmp_path):
    wrong = []
    for name, data in files.items():
        (tmp_path / "file").write_bytes(data)
        if not np.array_equal(readers.read(tmp_path / "file"), _expected(data)):
            wrong.append(name)
    assert wrong == []
    assert len(files) == 18 + 1 + 10 + 5


@pytest.mark.parametrize(
    ("towards", "ratio"), [((11, 15), 2), ((5, 7), 4), ((2, 3), 8), ((12, 15), 1), ((3, 30), 1)]
)
def test_scaled_decoding_equals_pillows_draft_bit_for_bit(files, tmp_path, towards, ratio):
    """Of a picture of 47 x 61; what is no JPEG is decoded whole."""
    for name, data in files.items():
        (tmp_path / "file").write_bytes(data)
        wanted, got = _expected(data, towards), readers.read(tmp_path / "file", towards=towards)
        small = ratio if name.startswith("jpeg") else 1
        assert got.shape == (-(-47 // small), -(-61 // small), 3)
        np.testing.assert_array_equal(got, wanted, err_msg=name)
        assert decode.size_of(tf.constant(data), tf.constant(got)).numpy().tolist() == [47, 61]


def test_the_default_dct_would_differ(files):
    data = files["jpeg RGB coarse"]
    fast = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_FAST").numpy().astype(int)
    assert np.abs(fast - _expected(data)).max() > 0


def test_interlaced_png(picture, png, encode, tmp_path):
    pixels = np.asarray(picture)
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    rows = b"".join(
        b"\0" + row.tobytes() for y, x, down, right in passes for row in pixels[y::down, x::right]
    )  # Adam7; 0: the row is not filtered
    (tmp_path / "file").write_bytes(png(61, 47, 8, 2, rows, interlace=1))
    np.testing.assert_array_equal(readers.read(tmp_path / "file"), pixels)


def test_bmp_from_the_top_down(bmp, tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    rows = b"".join(row[:, ::-1].tobytes() + b"\0" * 3 for row in pixels)  # blue first, rows of 12 bytes
    upside = b"".join(row[:, ::-1].tobytes() + b"\0" * 3 for row in pixels[::-1])
    for height, body in ((-2, rows), (2, upside)):
        (tmp_path / "file").write_bytes(bmp(3, height, 24, body=body))
        np.testing.assert_array_equal(readers.read(tmp_path / "file"), pixels)


def test_bytes_after_a_bmp_do_not_matter(files, tmp_path):
    for mode in ("RGB", "RGBA", "P"):
        data = files[f"bmp {mode}"]
        (tmp_path / "file").write_bytes(data + b"\0\0")
        np.testing.assert_array_equal(readers.read(tmp_path / "file"), _expected(data), err_msg=mode)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [(0, 65535), (1234.5, 40321.0), (30000, 30007)])
def test_deep_png_follows_the_window(channels, window, tmp_path):
    values = np.random.default_rng(channels).integers(0, 65536, (40, 50, channels), np.uint16)
    values[:20] = values[:20] % 20 + 29995  # around the narrow window
    (tmp_path / "file").write_bytes(tf.io.encode_png(values).numpy())
    got = readers.read(tmp_path / "file", window)
    _equals_float64(got, values[..., :1] if channels < 3 else values[..., :3], window)


def _equals_float64(got, values, window):
    """One level of difference is allowed where float64 itself lies at a tie."""
    low, high = window
    exact = 255 * np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    exact = np.broadcast_to(exact, got.shape)
    assert got.dtype == np.uint8
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-3
    np.testing.assert_array_equal(got[~tie], np.rint(exact[~tie]))
    assert np.abs(got[tie] - exact[tie]).max(initial=0) < 0.51


@pytest.mark.parametrize("options", [{}, {"compression": "lzw", "predictor": True}, {"compression": "zlib"}])
@pytest.mark.parametrize(
    "layout", ["grey", "grey, alpha", "rgb", "rgb, alpha", "rgb in planes", "big-endian"]
)
def test_deep_tiff_follows_the_window(layout, options, tmp_path):
    import tifffile

    values = np.random.default_rng(0).integers(0, 65536, (40, 50, 4), np.uint16)
    window, file = (1234.5, 40321.0), tmp_path / "file"
    alpha = {"extrasamples": ["unassalpha"]}
    wanted, written, how = {
        "grey": (values[..., :1], values[..., 0], {"photometric": "minisblack"}),
        "grey, alpha": (
            values[..., :1],
            values[..., :2],
            {"photometric": "minisblack", "planarconfig": "contig", **alpha},
        ),
        "rgb": (values[..., :3], values[..., :3], {"photometric": "rgb"}),
        "rgb, alpha": (values[..., :3], values, {"photometric": "rgb", **alpha}),
        "rgb in planes": (
            values[..., :3],
            np.moveaxis(values[..., :3], -1, 0),
            {"photometric": "rgb", "planarconfig": "separate"},
        ),
        "big-endian": (values[..., :3], values[..., :3], {"photometric": "rgb", "byteorder": ">"}),
    }[layout]
    tifffile.imwrite(file, written, **how, **options)
    got = readers.read(file, window)
    _equals_float64(got, wanted, window)
    raw = readers.raw_intensities(file)
    np.testing.assert_array_equal(raw, np.broadcast_to(wanted, (40, 50, 3)))

    channels = np.ascontiguousarray(wanted)
    (tmp_path / "png").write_bytes(tf.io.encode_png(channels).numpy())
    np.testing.assert_array_equal(got, readers.read(tmp_path / "png", window))  # NumPy as the graph
    np.testing.assert_array_equal(raw, readers.raw_intensities(tmp_path / "png"))


@pytest.mark.parametrize(
    ("size", "scaled"), [((47, 61), False), ((17, 31), False), ((90, 64), False), ((11, 13), True)]
)
def test_an_exported_model_sees_the_same_pixels(files, tmp_path, size, scaled):
    """`Exported._decoded` is what all its signatures that take bytes begin with."""
    window = (1000.0, 50000.0)
    deep = np.random.default_rng(0).integers(0, 65536, (47, 61, 1), np.uint16)
    every = {**files, "png of 16 bits": tf.io.encode_png(deep).numpy()}
    module = Exported(None, ["a", "b"], size, window, 10_000, scaled=scaled)
    spec = tf.TensorSpec((None,), tf.string, name="image_bytes")

    def decoded(image_bytes):
        return dict(zip(("pixels", "sizes"), module._decoded(image_bytes), strict=True))

    pixels = tf.function(decoded)
    tf.saved_model.save(module, tmp_path / "model", {"serving_default": pixels.get_concrete_function(spec)})

    loaded = tf.saved_model.load(tmp_path / "model")
    served = loaded.signatures["serving_default"](image_bytes=tf.constant(list(every.values())))
    assert (served["sizes"] == [47, 61]).numpy().all()  # of what was sent
    for (name, data), answer in zip(every.items(), served["pixels"].numpy(), strict=True):
        (tmp_path / "file").write_bytes(data)
        np.testing.assert_array_equal(
            pipeline.read_sized(tmp_path / "file", size, window, scaled=scaled), answer, err_msg=name
        )
        if size == (47, 61):  # the image's own: the resize changes nothing
            np.testing.assert_array_equal(readers.read(tmp_path / "file", window), answer, err_msg=name)


def test_resize_against_pillow(picture):
    """Pillow's bilinear filter is antialiased too; it rounds between its two passes."""
    got = decode.resize(tf.constant(np.asarray(picture)), (20, 33)).numpy().astype(int)
    wanted = np.asarray(picture.resize((33, 20), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(got - wanted).max() <= 1


def test_refusals_inside_the_graph(png, bmp, encode, picture):
    """What a served model says of files that no reader has looked at before."""
    jpeg = bytearray(encode(picture, "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 20000, 10000)
    deep = tf.io.encode_png(np.zeros((2, 2, 1), np.uint16)).numpy()
    cases = [
        (png(20000, 10000, 8, 0, b""), "max_pixels"),
        (bytes(jpeg), "max_pixels"),
        (bmp(20000, 10000, 24), "max_pixels"),
        (bmp(20000, -10000, 24), "max_pixels"),
        (bmp(-20, 10, 24), "no pixels"),
        (bmp(8, 2, 1, body=b"\0" * 8, palette=b"\0" * 8), "8, 24 or 32 bits"),
        (bmp(4, 1, 8, compression=1, body=b"\4\1\0\1", palette=b"\0" * 1024), "compressed"),
        (deep, "needs an intensity window"),
        (b"GIF89a" + b"\0" * 30, "not a JPEG, PNG or BMP"),
        (b"", "not a JPEG, PNG or BMP"),
        (b"BM", "."),
    ]
    graph = tf.function(decode.decode, input_signature=[tf.TensorSpec((), tf.string)])
    for data, words in cases:
        with pytest.raises(tf.errors.InvalidArgumentError, match=words):
            graph(tf.constant(data))


def test_a_window_must_have_a_width():
    with pytest.raises(ValueError, match=r"high > low\. Received: \(5, 5\)"):
        decode.scale_intensities(np.ones(3), (5, 5))
