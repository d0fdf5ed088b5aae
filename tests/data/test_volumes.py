"""Volumes in every kind: the voxels that were written, in their order; hostile files named, never guessed."""

import gzip

import numpy as np
import pytest
import tifffile
from PIL import Image

from keras_medattn.data import check, manifest, volumes
from keras_medattn.data.headers import ImageError

sitk = pytest.importorskip("SimpleITK", reason="needs the extra [volumes]")

RNG = np.random.default_rng(0)
EIGHT = RNG.integers(0, 256, (5, 12, 16), np.uint8)
DEEP = RNG.integers(-1000, 2000, (5, 12, 16)).astype(np.int16)
ITK = ("nrrd", "nii", "nii.gz", "mha")


def windowed(values, low, high):
    """`round(255 clip((v - low) / (high - low), 0, 1))`"""
    return np.rint(255 * np.clip((values - low) / (high - low), 0, 1))


def write(values, path):
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=values.ndim == 4), str(path))
    return path


def slices(folder, values, name="slice_{}.png"):
    folder.mkdir()
    for number, pixels in enumerate(values):
        Image.fromarray(pixels).save(folder / name.format(number + 1))
    return folder


def dicom(folder, values):
    """A CT series whose file names lie about the order of the slices."""
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for place, pixels in enumerate(values):
        image = sitk.GetImageFromArray(pixels)
        tags = {
            "0008|0060": "CT",
            "0008|0018": f"1.2.3.4.{place + 1}",
            "0020|000d": "1.2.3",
            "0020|000e": "1.2.3.4",
            "0020|0032": f"0\\0\\{3 * place}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        if pixels.dtype != np.uint8:
            tags |= {"0028|1052": "-1024", "0028|1053": "1"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{(3 * place) % len(values)}.dcm"))
        writer.Execute(image)
    return folder


@pytest.mark.parametrize("suffix", ITK)
def test_itk_files_hold_the_voxels_that_were_written(tmp_path, suffix):
    path = write(EIGHT, tmp_path / f"a.{suffix}")
    for channel in range(3):
        np.testing.assert_array_equal(volumes.read(path)[..., channel], EIGHT)
    header = volumes.check_header(path)
    assert (header.kind, header.width, header.height, header.pages, header.bits) == (suffix, 16, 12, 5, 8)
    deep = write(DEEP, tmp_path / f"b.{suffix}")
    np.testing.assert_array_equal(volumes.read(deep, (-500, 1500))[..., 1], windowed(DEEP, -500, 1500))


def test_colour_is_kept(tmp_path):
    colour = RNG.integers(0, 256, (3, 8, 9, 3), np.uint8)
    np.testing.assert_array_equal(volumes.read(write(colour, tmp_path / "a.nrrd")), colour)
    tifffile.imwrite(tmp_path / "a.tif", colour, photometric="rgb")
    np.testing.assert_array_equal(volumes.read(tmp_path / "a.tif"), colour)
    np.testing.assert_array_equal(volumes.read(slices(tmp_path / "a", colour)), colour)


@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"compression": "zlib"}, {"bigtiff": True}])
def test_pages_of_a_tiff(tmp_path, options):
    values = (DEEP + 1000).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", **options)
    assert volumes.is_volume(tmp_path / "a.tif")
    pixels = volumes.read(tmp_path / "a.tif", (0, 3000))
    np.testing.assert_array_equal(pixels[..., 0], windowed(values, 0, 3000))


def test_a_folder_of_slices_is_sorted_by_number(tmp_path):
    many = RNG.integers(0, 256, (12, 6, 7), np.uint8)
    folder = slices(tmp_path / "a", many)  # slice_10 would stand before slice_2 by name
    (folder / "notes.txt").write_text("not a slice")
    (folder / ".hidden.png").write_bytes(b"")
    np.testing.assert_array_equal(volumes.read(folder)[..., 0], many)
    np.testing.assert_array_equal(volumes.read(folder, central=4)[..., 0], many[4:8])
    np.testing.assert_array_equal(volumes.read(folder, central=5)[..., 0], many[3:8])
    assert len(volumes.read(folder, central=99)) == 12
    assert volumes.check_header(folder).pages == 12


def test_a_dicom_series_is_sorted_by_place(tmp_path):
    folder = dicom(tmp_path / "ct", DEEP)
    np.testing.assert_array_equal(volumes.read(folder, (-1000, 1000))[..., 2], windowed(DEEP, -1000, 1000))
    header = volumes.check_header(folder)
    assert (header.kind, header.pages) == ("dicom series", 5)
    [frame] = dicom(tmp_path / "inverse", EIGHT[:1]).iterdir()
    np.testing.assert_array_equal(volumes.read(frame)[0, ..., 0], EIGHT[0])
    frame.write_bytes(frame.read_bytes().replace(b"MONOCHROME2", b"MONOCHROME1"))  # 0 is white
    np.testing.assert_array_equal(volumes.read(frame)[0, ..., 0], 255 - EIGHT[0])


def test_a_window_is_needed_and_proposed(tmp_path):
    path = write(DEEP, tmp_path / "a.nrrd")
    low, high = np.percentile(DEEP, [0.5, 99.5])
    with pytest.raises(ImageError, match=rf"a\.nrrd: .* int16 need a window.* \[{low:.6g}, {high:.6g}\]"):
        volumes.read(path)
    holes = DEEP.astype(np.float32)
    holes[0, 0, 0] = np.nan
    pixels = volumes.read(write(holes, tmp_path / "b.mha"), (-1000, 2000))
    assert pixels[0, 0, 0, 0] == 0
    np.testing.assert_array_equal(pixels[1:, ..., 0], windowed(DEEP[1:], -1000, 2000))


def test_size_is_checked_before_a_pixel_is_read(tmp_path):
    path = write(EIGHT, tmp_path / "a.nrrd")
    path.write_bytes(path.read_bytes()[:-900])  # a read would fail
    with pytest.raises(ImageError, match=r"16 x 12 x 5 pixels in all; allowed are 1 to 900"):
        volumes.read(path, max_pixels=900)


@pytest.mark.parametrize("suffix", ITK)
def test_damaged_files_are_named(tmp_path, suffix):
    whole = write(DEEP, tmp_path / f"a.{suffix}").read_bytes()
    bad = tmp_path / f"bad.{suffix}"
    for data in (b"", RNG.bytes(400), whole[:60], whole[: 2 * len(whole) // 3]):
        bad.write_bytes(data)
        with pytest.raises(ImageError, match=rf"bad\.{suffix}"):
            volumes.read(bad, (0, 1000))


def test_a_short_nifti_is_not_filled_up_with_zeros(tmp_path):
    """ITK would, without a word."""
    for name, order in (("a.nii", "<"), ("b.nii", ">")):
        whole = bytearray(write(DEEP, tmp_path / name).read_bytes())
        if order == ">":  # a header of the other byte order, as far as its length is told by it
            for start, size in (
                (0, 4),
                (108, 4),
                *((place, 2) for place in range(40, 56, 2)),
                (70, 2),
                (72, 2),
            ):
                whole[start : start + size] = whole[start : start + size][::-1]
        short = bytes(whole[:-2])
        (tmp_path / name).write_bytes(short)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(short))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            with pytest.raises(ImageError, match=r"holds 2,270 of 2,272 bytes"):
                volumes._check_nifti(path)


def test_what_is_no_volume_says_so(tmp_path):
    four = write(np.zeros((2, 3, 4, 5), np.uint8).astype(np.uint8), tmp_path / "vector.nrrd")
    with pytest.raises(ImageError, match=r"vector\.nrrd: a volume has three axes, and is grey or RGB"):
        volumes.read(four)
    sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros((2, 3, 4, 5), np.uint8), isVector=False), str(tmp_path / "4d.nii")
    )
    with pytest.raises(ImageError, match=r"size=\(5, 4, 3, 2\)"):
        volumes.read(tmp_path / "4d.nii")
    tifffile.imwrite(tmp_path / "4d.tif", np.zeros((2, 3, 8, 9), np.uint8), photometric="minisblack")
    with pytest.raises(ImageError, match=r"4d\.tif: the pages of a volume must be slices of one size"):
        volumes.read(tmp_path / "4d.tif")
    with tifffile.TiffWriter(tmp_path / "mixed.tif") as file:
        file.write(EIGHT[0], photometric="minisblack")
        file.write(EIGHT[1, :5], photometric="minisblack")
    with pytest.raises(ImageError, match=r"mixed\.tif: the pages of a volume must be slices of one size"):
        volumes.read(tmp_path / "mixed.tif")
    Image.fromarray(EIGHT[0]).save(tmp_path / "one.png")
    with pytest.raises(ImageError, match=r"one\.png: a single PNG image is no volume"):
        volumes.read(tmp_path / "one.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match=r"empty: .*Received: 0 files, 0 series"):
        volumes.read(tmp_path / "empty")
    with pytest.raises(ImageError, match=r"absent: cannot be read"):
        volumes.read(tmp_path / "absent")
    folder = slices(tmp_path / "a", EIGHT)
    Image.fromarray(EIGHT[0, :5]).save(folder / "slice_3.png")
    with pytest.raises(ImageError, match=r"slice_3\.png: the slices of a volume must have one size"):
        volumes.read(folder)


def test_two_series_in_a_folder_are_not_mixed(tmp_path):
    folder = dicom(tmp_path / "ct", DEEP[:2])
    image = sitk.GetImageFromArray(DEEP[2])
    for tag, value in {"0020|000d": "1.2.3", "0020|000e": "1.2.9", "0008|0018": "1.2.9.1"}.items():
        image.SetMetaData(tag, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(folder / "other.dcm"))
    writer.Execute(image)
    with pytest.raises(ImageError, match=r"Received: 3 files, 2 series"):
        volumes.read(folder, (0, 1))


def test_check_tells_what_it_read(tmp_path):
    slices(tmp_path / "a", EIGHT)
    slices(tmp_path / "b", EIGHT[:3])
    write(DEEP, tmp_path / "c.nrrd")
    (tmp_path / "set.csv").write_text("path,label\na,x\nb,y\nc.nrrd,y\n")
    report = check.check(manifest.load(tmp_path / "set.csv"))
    assert report.kinds == {"folder of png 8 bit L": 2, "nrrd 16 bit grey": 1}
    assert "16 x 12 x 3 slices" in report.sizes
    assert any("3 are volumes" in one for one in report.warnings)
    [problem] = report.problems
    assert problem.startswith("1 images have 16 bits and no intensity window is set")
    np.testing.assert_allclose(report.proposed_window, np.percentile(DEEP, [0.5, 99.5]))
    assert check.check(manifest.load(tmp_path / "set.csv"), (-1000, 1000)).ok
