"""Public sets in the layout in which they are distributed, with the papers' protocols."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from keras_medattn.data.manifest import Manifest, ManifestError
from keras_medattn.data.sets import breakhis, common, folders, idrid, jaffe, ucsb
from keras_medattn.data.sets.common import Found, Progress, PublicSet

__all__ = ["SETS", "Found", "PublicSet", "find", "load", "ucsb"]


def _by_image(read):
    """The same set without its patients: split by image, as the papers did."""

    def without(root: Path) -> Found:
        found = read(root)
        return replace(found, manifest=replace(found.manifest, patients=None))

    return without


_EYES = common.Edit("idrid_224", idrid.prepared)
_FACES = common.Edit("jaffe_224", jaffe.prepared)
SETS = {
    "breakhis": PublicSet(breakhis.read, breakhis.IMAGES),
    "bach": PublicSet(folders.bach, 400),
    "crc_msi": PublicSet(folders.crc_msi, 192_312),
    "lymphoma": PublicSet(folders.lymphoma, 374),
    "lymphoma_by_image": PublicSet(_by_image(folders.lymphoma), 374),
    "idrid_retinopathy": PublicSet(idrid.retinopathy, 516, _EYES),
    "idrid_edema": PublicSet(idrid.edema, 516, _EYES),
    "idrid_referable": PublicSet(idrid.referable, 516),
    "jaffe": PublicSet(jaffe.read, jaffe.IMAGES, _FACES),
    "jaffe_by_image": PublicSet(_by_image(jaffe.read), jaffe.IMAGES, _FACES),
}


def find(name: str, root: Path | str) -> Found:
    """Look what of a public set lies in a folder, without reading a pixel.

    Args:
        name: one of `SETS`.
        root: the folder into which the set was unpacked.

    Raises:
        ManifestError: an unknown name; a folder or label file is missing.
    """
    if name not in SETS:
        raise ManifestError(f"no public set is called so; choose from {sorted(SETS)}. Received: {name!r}")
    return SETS[name].read(Path(root))


def load(
    name: str, root: Path | str, out: Path | str, progress: Progress = lambda items, _: items
) -> Manifest:
    """Read a public set by its paper's protocol.

    Args:
        name: one of `SETS`.
        root: the folder into which the set was unpacked.
        out: where a protocol that edits pixels writes the edited images, once; they are then the manifest's.
        progress: wraps the loop over the images that are written.

    Raises:
        ManifestError: as `find`; and for a set of which images are missing, with how many and which.
    """
    found = find(name, root)
    if found.problems:
        raise ManifestError(
            f"{root}: the set {name} is not whole (`medattn check {root} --set {name}` tells more):\n  "
            + "\n  ".join(found.problems)
        )
    edit = SETS[name].edit
    return common.edited(found.manifest, edit, Path(out), progress) if edit else found.manifest
