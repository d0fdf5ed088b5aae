"""Where a run keeps its images."""

import os
import shutil

import numpy as np
from PIL import Image

from keras_medattn.data import manifest as manifests
from keras_medattn.train import inputs, recipe


def settings(**data):
    return recipe.from_dict({"data": {"image_size": [32, 48], "memory_gb": 0.0, **data}})


def fetched(kind, table, cache):
    return inputs.images(kind, table, lambda items, *_: items, cache)(np.arange(len(table))[::-1], 0)


def test_decoded_images_in_a_file_are_the_images_and_follow_their_files(tiny_set, tmp_path):
    home = shutil.copytree(tiny_set.parent, tmp_path / "set")
    table, cache = manifests.load(home / tiny_set.name), tmp_path / "cache"
    plain = fetched(settings(), table, cache)
    assert not cache.exists()
    np.testing.assert_array_equal(fetched(settings(disk_gb=1.0), table, cache), plain)
    [path] = cache.iterdir()
    made = path.stat().st_mtime_ns
    np.testing.assert_array_equal(fetched(settings(disk_gb=1.0), table, cache), plain)
    assert path.stat().st_mtime_ns == made

    pixels = np.zeros((60, 70, 3), np.uint8)
    Image.fromarray(pixels).save(table.paths[0])
    os.utime(table.paths[0], ns=(made, made))
    changed = fetched(settings(disk_gb=1.0), table, cache)
    assert changed[-1].max() == 0
    np.testing.assert_array_equal(changed[:-1], plain[:-1])
    assert len(list(cache.iterdir())) == 2


def test_images_above_what_the_disk_may_hold_are_read_again(tiny_set, tmp_path):
    fetched(settings(disk_gb=1e-6), manifests.load(tiny_set), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
