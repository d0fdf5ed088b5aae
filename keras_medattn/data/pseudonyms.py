"""Ids in place of names, for what leaves the hospital while the images stay."""

from __future__ import annotations

import hmac
import secrets
from dataclasses import replace
from pathlib import Path

from keras_medattn.data.manifest import Manifest
from keras_medattn.files import written_aside


class Pseudonyms:
    """Names to ids: the first 16 hexadecimal digits of HMAC-SHA256 of the name under a key that a run keeps.

    The same name has the same id in all that is written of a run, and another one in every other run. Who has
    the key and a list of names can tell whose id it is; who has only the ids cannot.

    Args:
        run: the run folder; its file `pseudonyms.key`, readable by its owner alone, is made where it is not.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> Pseudonyms(run)("a.png") == Pseudonyms(run)("a.png") != Pseudonyms(run)("b.png")
        True
    """

    def __init__(self, run: Path):
        path = run / "pseudonyms.key"
        if not path.is_file():
            with written_aside(path) as aside:
                aside.touch(0o600)
                aside.write_text(secrets.token_hex(32) + "\n", encoding="ascii")
        self._key = bytes.fromhex(path.read_text(encoding="ascii"))

    def __call__(self, name: str) -> str:
        return hmac.new(self._key, name.encode(), "sha256").hexdigest()[:16]

    def table(self, manifest: Manifest) -> Manifest:
        """The table with ids for its images and patients, and without its further columns, which may name."""
        patients = None if manifest.patients is None else tuple(map(self, manifest.patients))
        return replace(
            manifest, root=Path(), names=tuple(map(self, manifest.names)), patients=patients, columns={}
        )
