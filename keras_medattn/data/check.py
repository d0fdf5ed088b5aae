"""Look at every image before training does, and report all that is wrong, not the first thing."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from keras_medattn.data import readers, volumes
from keras_medattn.data.headers import MAX_PIXELS, Header, ImageError, check_header
from keras_medattn.data.manifest import Manifest, patients_on_two_sides


@dataclass
class Report:
    """What `check` found; `ok` is False when training on the data would fail or give wrong figures."""

    images: int
    classes: dict[str, int]
    splits: dict[str, dict[str, int]]
    patients: int | None
    folds: list[dict[str, dict[str, int]]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    proposed_window: tuple[float, float] | None = None

    @property
    def ok(self) -> bool:
        """True when nothing stands in the way of training."""
        return not self.problems

    def to_dict(self) -> dict:
        """The report as plain values, for JSON."""
        return asdict(self) | {"ok": self.ok}


def check(
    manifest: Manifest,
    window: readers.Window | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[Iterable, int], Iterable] = lambda items, _: items,
) -> Report:
    """Decode every image with the decoder that training uses and report what is wrong.

    Args:
        manifest: the images.
        window: intensity window of 16-bit images; None: one is proposed.
        max_pixels: larger images are problems.
        progress: wraps the loop over `(items, total)`, say with a progress bar.
    """
    report = Report(
        images=len(manifest),
        classes={name: int((manifest.labels == i).sum()) for i, name in enumerate(manifest.class_names)},
        splits=_by_side(manifest, manifest.splits),
        folds=[_by_side(manifest, sides) for sides in manifest.folds or ()],
        patients=None if manifest.patients is None else len(set(manifest.patients)),
    )
    paths = manifest.paths
    with ThreadPoolExecutor() as pool:
        looks = pool.map(lambda path: _look(path, window, max_pixels), paths)
        results = list(progress(looks, len(paths)))
    headers = [header for header, _, _ in results if header is not None]
    report.sizes = _count(_size(header) for header in headers)
    report.kinds = _count(f"{header.kind} {header.bits} bit {header.mode}" for header in headers)
    report.problems += [error for _, _, error in results if error]
    _patients(manifest, report)
    _duplicates(manifest, [digest for _, digest, _ in results], report)
    _deep(paths, [header for header, _, _ in results], window, report)
    stacks = sum(header.pages > 1 for header in headers)
    if stacks:
        report.warnings.append(f"{stacks} are volumes: a recipe reads them where its data.slices is set")
    rotated = [
        name
        for name, (header, _, _) in zip(manifest.names, results, strict=True)
        if header is not None and header.rotated
    ]
    if rotated:
        report.warnings.append(
            f"{len(rotated)} images carry an EXIF rotation, which is ignored everywhere: {_some(rotated)}"
        )
    outside = [
        name
        for name, path in zip(manifest.names, paths, strict=True)
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(manifest.root))
    ]
    if outside:
        report.warnings.append(f"{len(outside)} paths lead out of {manifest.root}: {_some(outside)}")
    ratios = {round(header.width / header.height, 2) for header in headers}
    if len(ratios) > 1:
        report.warnings.append(
            f"aspect ratios differ ({min(ratios)} to {max(ratios)}): every image is resized to one size, "
            "so some will be stretched"
        )
    counts = report.classes.values()
    if max(counts) > 10 * min(counts):
        report.warnings.append(f"classes are out of balance: {report.classes}. See train.class_weights")
    return report


def text(report: Report) -> str:
    """The report as lines to read: counts, warnings, problems, verdict."""
    patients = "unknown" if report.patients is None else report.patients
    lines = [f"images    {report.images}", f"patients  {patients}"]
    for title, counts in (("classes", report.classes), ("kinds", report.kinds), ("sizes", report.sizes)):
        shown = [f"{name}: {count}" for name, count in list(counts.items())[:8]]
        more = [f"and {len(counts) - 8} more"] if len(counts) > 8 else []
        lines.append(f"{title:<9} " + ", ".join(shown + more))
    lines += [f"split     {split}: {counts}" for split, counts in report.splits.items()]
    for number, sides in enumerate(report.folds, 1):
        lines += [f"fold {number:<4} {side}: {counts}" for side, counts in sides.items()]
    lines += [f"warning   {one}" for one in report.warnings]
    lines += [f"problem   {one}" for one in report.problems]
    lines.append(
        "ok: nothing stands in the way of training" if report.ok else f"{len(report.problems)} problems"
    )
    return "\n".join(lines)


def _look(path: Path, window, max_pixels: int) -> tuple[Header | None, str | None, str | None]:
    """Header, digest of the pixels, error."""
    try:
        if volumes.is_volume(path):
            return _look_at_volume(path, window, max_pixels)
        header = check_header(path, max_pixels=max_pixels)
    except ImageError as error:
        return None, None, str(error)
    try:
        # a missing window is a problem of its own, said once
        pixels = readers.read(path, window or ((0, 65535) if header.bits == 16 else None), max_pixels)
        if header.bits == 16 and window is None:  # mapped by that window, dark images would all look the same
            pixels = readers.raw_intensities(path, max_pixels)
    except ImageError as error:
        return header, None, str(error)
    return header, hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest(), None


def _look_at_volume(path: Path, window, max_pixels: int) -> tuple[Header | None, str | None, str | None]:
    header = volumes.check_header(path, max_pixels)
    try:
        if header.bits > 8 and window is None:
            pixels = volumes.raw_intensities(path, max_pixels)
        else:
            pixels = volumes.read(path, window, max_pixels)
    except ImageError as error:
        return header, None, str(error)
    return header, hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest(), None


def _patients(manifest: Manifest, report: Report) -> None:
    if manifest.patients is None:
        report.warnings.append(
            "no patients are named: splits and intervals treat images as independent, which is too "
            "optimistic where a patient has several. Add a `patient` column to a CSV if you know them"
        )
    for patient in patients_on_two_sides(manifest):
        report.problems.append(f"patient {patient} stands in more than one split")
    for number, sides in enumerate(manifest.folds or (), 1):
        for patient in patients_on_two_sides(manifest, sides):
            report.problems.append(f"patient {patient} stands on more than one side of fold {number}")


def _duplicates(manifest: Manifest, digests: list[str | None], report: Report) -> None:
    places = defaultdict(list)
    for place, digest in enumerate(digests):
        if digest is not None:
            places[digest].append(place)
    for same in places.values():
        if len(same) < 2:
            continue
        names = _some([manifest.names[i] for i in same])
        if len({int(manifest.labels[i]) for i in same}) > 1:
            report.problems.append(f"the same pixels carry different labels: {names}")
        elif manifest.splits is not None and len({manifest.splits[i] for i in same}) > 1:
            report.problems.append(f"the same pixels stand in more than one split: {names}")
        else:
            report.warnings.append(f"the same pixels stand more than once: {names}")


def _deep(paths: list[Path], headers: list[Header | None], window, report: Report) -> None:
    """Propose a window from the 0.5 and 99.5 percentiles of up to 20 of the deep images and volumes."""
    pairs = [(path, header.bits) for path, header in zip(paths, headers, strict=True) if header]
    deep = {path: bits for path, bits in pairs if bits == 16 or (bits > 8 and volumes.is_volume(path))}
    if not deep or window is not None:
        return
    sample = list(deep)[:: max(1, len(deep) // 20)][:20]
    limits = []
    for path in sample:
        try:
            raw = volumes.raw_intensities if volumes.is_volume(path) else readers.raw_intensities
            values = raw(path)
            limits.append(np.percentile(values[np.isfinite(values)], [0.5, 99.5]))
        except Exception:  # unreadable ones are reported already
            continue
    if limits:
        low, high = min(low for low, _ in limits), max(high for _, high in limits)
        report.proposed_window = (float(low), float(max(high, low + 1)))
    bits = " or ".join(str(bits) for bits in sorted(set(deep.values())))
    report.problems.append(
        f"{len(deep)} images have {bits} bits and no intensity window is set: "
        f"{_some([str(path) for path in deep])}. "
        f"Proposed: window = {list(report.proposed_window or ())} (0.5 and 99.5 percentiles of {len(sample)})"
    )


def _size(header: Header) -> str:
    size = f"{header.width} x {header.height}"
    return size if header.pages == 1 else f"{size} x {header.pages} slices"


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _by_side(manifest: Manifest, sides: Sequence[str] | None) -> dict[str, dict[str, int]]:
    table: dict[str, Counter] = defaultdict(Counter)
    for side, label in zip(sides or (), manifest.labels, strict=sides is not None):
        table[side][manifest.class_names[label]] += 1
    return {side: dict(counts) for side, counts in table.items()}


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
