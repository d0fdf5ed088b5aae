"""Somebody else's client of TensorFlow Serving's interfaces: OpenVINO Model Server's."""

import numpy as np
import pytest
from serve.conftest import expected, picture

ovmsclient = pytest.importorskip("ovmsclient")


@pytest.mark.parametrize("door", ["grpc", "http"])
def test_it_asks_and_is_answered(server, rest, door):
    make = {"grpc": ovmsclient.make_grpc_client, "http": ovmsclient.make_http_client}[door]
    client = make({"grpc": server[0], "http": rest}[door])
    # "The newest" is version 0 there, which no server of TensorFlow's knows: it is named.
    status = client.get_model_status("toy", 2)
    assert status[2]["state"] == "AVAILABLE"
    assert status[2]["error_code"] == 0
    metadata = client.get_model_metadata("toy", 2)
    if door == "http":
        # It expects that server's own "modelSpec", and hands out what TensorFlow Serving writes as it is.
        assert metadata["model_spec"]["version"] == "2"
    else:
        assert metadata["model_version"] == 2
        assert metadata["inputs"] == {"image_bytes": {"shape": [-1], "dtype": "DT_STRING"}}
    data = [picture(1), picture(2)]
    answer = client.predict({"image_bytes": data}, "toy", 2)
    np.testing.assert_allclose(answer["probabilities"], [expected(d) for d in data], atol=1e-6)
    with pytest.raises(ovmsclient.ModelNotFoundError, match=r"Specific\(nobody, 3\)"):
        client.predict({"image_bytes": data}, "nobody", 3)
    with pytest.raises(ovmsclient.InvalidInputError, match="not an image of a known kind"):
        client.predict({"image_bytes": [b"GIF89a"]}, "toy", 2)
