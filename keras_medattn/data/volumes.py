"""Volumes to slices: folders of slices, multi-page TIFF, and what SimpleITK reads."""

from __future__ import annotations

import gzip
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from keras_medattn.data import headers, readers
from keras_medattn.data.headers import MAX_PIXELS, Header, ImageError
from keras_medattn.data.manifest import SUFFIXES
from keras_medattn.data.readers import Window

ITK_SUFFIXES = (".nrrd", ".nhdr", ".nii", ".nii.gz", ".mha", ".mhd", ".dcm")


def is_volume(path: Path | str) -> bool:
    """Whether a path is a folder, a file of a volume's kind, or a TIFF of several pages."""
    path = Path(path)
    if path.is_dir() or path.name.lower().endswith(ITK_SUFFIXES):
        return True
    return path.suffix.lower() in (".tif", ".tiff") and _header(path).pages > 1


def check_header(path: Path | str, max_pixels: int = MAX_PIXELS) -> Header:
    """Read what a volume says of itself; its slices are the header's `pages`.

    Raises:
        ImageError: as `read`, but for what only the pixels tell.
    """
    header = _header(Path(path))
    shape = (header.width, header.height, header.pages)
    if min(shape) < 1 or np.prod(shape, dtype=float) > max_pixels:
        raise ImageError(
            f"{path}: {' x '.join(map(str, shape))} pixels in all; allowed are 1 to {max_pixels:,}. "
            "Downsize the volume, or raise max_pixels if you trust it"
        )
    return header


def read(
    path: Path | str, window: Window | None = None, max_pixels: int = MAX_PIXELS, central: int = 0
) -> np.ndarray:
    """Read a volume as a stack of RGB slices, along the axis that it was acquired or stored in.

    - A folder of images: its slices by name, where numbers count (`slice_2` before `slice_10`).
    - A folder of DICOM files, of one series: by their place along the normal of the slices (extra
      `[volumes]`).
    - A TIFF: its pages.
    - NRRD, NIfTI, MetaImage, DICOM of several frames: along the slowest stored axis (extra `[volumes]`).

    Rows and columns lie as they are stored: no volume is turned by its direction matrix. DICOM's MONOCHROME1,
    in which 0 is white, is read inverted, as ITK does.

    Args:
        path: the file or folder.
        window: intensities that become 0 and 255, of volumes that are not of 8 bits.
        max_pixels: volumes with more pixels in all their slices are refused before they are read.
        central: slices around the middle one to answer; 0, or more than there are: all.

    Returns:
        `(S, H, W, 3)` uint8, possibly a read-only view.

    Raises:
        ImageError: names the file or folder and what is wrong with it.
    """
    path = Path(path)
    header = check_header(path, max_pixels)
    count = min(central or header.pages, header.pages)
    first = (header.pages - count) // 2
    if path.is_dir() and (files := _images(path)):
        return _stacked(files[first : first + count], window, max_pixels)
    return _rgb(_values(path, header)[first : first + count], window, path)


def raw_intensities(path: Path | str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a volume of more than 8 bits as it is: `(S, H, W)` or `(S, H, W, 3)`, in any kind of number."""
    path = Path(path)
    header = check_header(path, max_pixels)
    if path.is_dir() and (files := _images(path)):
        return np.stack([readers.raw_intensities(file, max_pixels) for file in files])
    return _values(path, header)


def _values(path: Path, header: Header) -> np.ndarray:
    try:
        values = _tiff_series(path)[1]() if header.kind == "tiff" else _itk_values(path)
    except ImageError:
        raise
    except Exception as error:  # hostile bytes: parsers raise anything
        raise ImageError(f"{path}: damaged or unsupported volume: {_line(error)}") from error
    if values.shape[:3] != (header.pages, header.height, header.width):
        raise ImageError(f"{path}: damaged volume: its header tells another size than its pixels have")
    return values


def _header(path: Path) -> Header:
    try:
        if path.is_dir():
            return _folder_header(path)
        if path.name.lower().endswith(ITK_SUFFIXES):
            return _itk_header(path, [path])
        header = headers.read_header(path)
        if header.kind == "tiff":
            return _tiff_series(path)[0]
    except ImageError:
        raise
    except Exception as error:  # hostile bytes: parsers raise anything
        raise ImageError(f"{path}: damaged or unsupported volume: {_line(error)}") from error
    raise ImageError(
        f"{path}: a single {header.kind.upper()} image is no volume. Where data.slices is set, a row names a "
        "folder of slices, a TIFF of several pages, or a file of NRRD, NIfTI, MetaImage or DICOM"
    )


def _folder_header(folder: Path) -> Header:
    files = _images(folder)
    if not files:
        return _itk_header(folder, _series(folder))
    first = headers.read_header(files[0])
    return Header(
        f"folder of {first.kind}", first.width, first.height, first.bits, first.mode, pages=len(files)
    )


def _images(folder: Path) -> list[Path]:
    """The image files of a folder, by name, numbers by value."""
    found = [
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
    return sorted(
        found, key=lambda path: [(not s.isdigit(), int(s) if s.isdigit() else s) for s in _split(path)]
    )


def _split(path: Path) -> list[str]:
    return [part for part in re.split(r"(\d+)", path.name) if part]


def _stacked(files: list[Path], window: Window | None, max_pixels: int) -> np.ndarray:
    slices = [readers.read(path, window, max_pixels) for path in files]
    for path, pixels in zip(files, slices, strict=True):
        if pixels.shape != slices[0].shape:
            raise ImageError(
                f"{path}: the slices of a volume must have one size. Received: {pixels.shape[1]} x "
                f"{pixels.shape[0]} after {slices[0].shape[1]} x {slices[0].shape[0]}"
            )
    return np.stack(slices)


def _tiff_series(path: Path) -> tuple[Header, Any]:
    """Header of a TIFF's pages, and a function that reads them: `(S, H, W)` or `(S, H, W, C)`."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        series, page = file.series, file.series[0].keyframe
        colour = page.photometric.name  # type: ignore[union-attr]
        samples = page.samplesperpixel  # type: ignore[union-attr]
        shape, axes = series[0].shape, series[0].axes
    height, width, *rest = shape[-2 - (samples > 1) :]
    if len(series) > 1 or len(shape) - len(rest) not in (2, 3) or not axes.endswith("YXS"[: 2 + len(rest)]):
        raise ImageError(
            f"{path}: the pages of a volume must be slices of one size, without further axes. "
            f"Received: {[(one.axes, one.shape) for one in series[:4]]}"
        )
    if colour not in ("MINISBLACK", "RGB"):
        raise ImageError(f"{path}: a TIFF of slices must be grey (MINISBLACK) or RGB. Received: {colour}")
    pages = shape[0] if len(shape) - len(rest) == 3 else 1

    def read() -> np.ndarray:
        with tifffile.TiffFile(path) as file:
            return file.series[0].asarray().reshape(pages, height, width, *rest)

    return Header("tiff", width, height, 8 * series[0].dtype.itemsize, colour, pages=pages), read


def _itk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise ImageError(
            'NRRD, NIfTI, MetaImage and DICOM are read by SimpleITK: pip install "keras-medattn[volumes]"'
        ) from error
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # what matters of it is in our errors
    return SimpleITK


def _series(folder: Path) -> list[Path]:
    """The files of the one DICOM series in a folder, in the order of their places."""
    kept = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    reader = _itk().ImageSeriesReader
    series = reader.GetGDCMSeriesIDs(str(folder)) if kept else ()
    if len(series) != 1:
        raise ImageError(
            f"{folder}: a volume's folder holds images ({', '.join(sorted(SUFFIXES))}) or one DICOM series. "
            f"Received: {len(kept)} files, {len(series)} series"
        )
    return [Path(name) for name in reader.GetGDCMSeriesFileNames(str(folder), series[0])]


def _itk_header(path: Path, files: list[Path]) -> Header:
    """The header of a file, or of a series by its first."""
    if not files[0].is_file() or not files[0].stat().st_size:
        raise ImageError(f"{path}: the file is missing or empty. Copy it again from its source")
    itk = _itk()
    reader = itk.ImageFileReader()
    reader.SetFileName(str(files[0]))
    reader.ReadImageInformation()
    size, samples = reader.GetSize(), reader.GetNumberOfComponents()
    if (
        len(size) not in (2, 3)
        or samples not in (1, 3)
        or (len(files) > 1 and len(size) == 3 and size[2] > 1)
    ):
        raise ImageError(
            f"{path}: a volume has three axes, and is grey or RGB. Received: size={size}, {samples} channels"
        )
    pages = len(files) if len(files) > 1 else (*size, 1)[2]
    mode = "RGB" if samples == 3 else "grey"
    kind = next((end[1:] for end in ITK_SUFFIXES if path.name.lower().endswith(end)), "dicom series")
    bits = 8 * itk.GetArrayViewFromImage(itk.Image([1, 1], reader.GetPixelID(), samples)).itemsize
    return Header(kind, size[0], size[1], bits, mode, pages=pages)


def _itk_values(path: Path) -> np.ndarray:
    itk = _itk()
    if path.name.lower().endswith((".nii", ".nii.gz")):
        _check_nifti(path)
    image = itk.ReadImage([str(file) for file in _series(path)] if path.is_dir() else str(path))
    values = itk.GetArrayFromImage(image)
    return values[None] if image.GetDimension() == 2 else values


def _check_nifti(path: Path) -> None:
    """Refuse a NIfTI file that ends too early: ITK would fill it up with zeros without a word."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        start = file.read(176)
        order = "<" if struct.unpack("<i", start[:4])[0] in (348, 540) else ">"
        first = struct.unpack(order + "i", start[:4])[0] == 348  # NIfTI-1; 540: NIfTI-2
        shape = (
            struct.unpack(order + "8h", start[40:56]) if first else struct.unpack(order + "8q", start[16:80])
        )
        bits = struct.unpack_from(order + "h", start, 72 if first else 14)[0]
        offset = struct.unpack_from(order + ("f" if first else "q"), start, 108 if first else 168)[0]
        wanted = int(offset) + math.prod(shape[1 : 1 + shape[0]]) * bits // 8
        length = file.seek(0, 2)
    if length < wanted:
        raise ImageError(f"{path}: damaged NIfTI: it holds {length:,} of {wanted:,} bytes. Copy it again")


def _rgb(values: np.ndarray, window: Window | None, path: Path) -> np.ndarray:
    """Intensities to pixels `(S, H, W, 3)` uint8."""
    if values.dtype != np.uint8:
        values = _windowed(values, window, path)
    values = values[..., None] if values.ndim == 3 else values[..., :3]
    return np.broadcast_to(values, (*values.shape[:3], 3))


def _windowed(values: np.ndarray, window: Window | None, path: Path) -> np.ndarray:
    from keras_medattn.data.decode import scale_intensities

    if window is None:
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, [0.5, 99.5]) if len(finite) else (0.0, 1.0)
        raise ImageError(
            f"{path}: intensities of kind {values.dtype} need a window. Set data.window = [low, high] in the "
            f"recipe; of this volume the 0.5 and 99.5 percentiles are [{low:.6g}, {max(high, low + 1):.6g}]"
        )
    scaled = scale_intensities(values.astype(np.float32), window)
    return np.rint(np.clip(np.nan_to_num(scaled, nan=0.0), 0, 255)).astype(np.uint8)


def _line(error: Exception) -> str:
    """The line of an error that tells most: of ITK's the last, but for the system's reason."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Reason")]
    return (lines or [type(error).__name__])[-1]
