"""The files of serving/ against TensorFlow Serving's own messages."""

from pathlib import Path

from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

SERVING = Path(__file__).resolve().parents[2] / "serving"


def test_models_config_parses():
    text = (SERVING / "tf_serving" / "models.config").read_text()
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    [model] = config.model_config_list.config
    assert (model.name, model.base_path, model.model_platform) == ("demo", "/models/demo", "tensorflow")
    assert model.model_version_policy.latest.num_versions == 1
