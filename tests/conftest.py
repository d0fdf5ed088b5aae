"""What every test shares: two logical CPUs, one strategy for the whole run, fixed seeds."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _two_cpus() -> None:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    _two_cpus()  # before TensorFlow starts, or it is too late


@pytest.fixture(scope="session")
def mirrored():
    """The one MirroredStrategy of the run: a second one breaks TensorFlow's collectives."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(autouse=True)
def _seeded():
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images that may lie beside the project; a user does not have them."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images in {folder}")
    return folder
