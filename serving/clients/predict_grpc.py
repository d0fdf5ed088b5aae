"""Ask a TensorFlow Serving about images over gRPC: `python predict_grpc.py HOST:PORT MODEL IMAGE...`.

It needs `tensorflow-serving-api` alone (which brings TensorFlow and gRPC), nothing of ours.
"""

import json
import sys
from pathlib import Path

import grpc
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

# A Predict changes nothing, so that asking again does no harm.
RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
OPTIONS = [
    ("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": RETRY}]})),
    ("grpc.max_send_message_length", 64 << 20),
    # Larger requests would not be sent again.
    ("grpc.per_rpc_retry_buffer_size", 64 << 20),
]


def main(target: str, model: str, *images: str) -> None:
    """Print the class of each image and its probability."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    files = [Path(name).read_bytes() for name in images]  # JPEG, PNG or BMP, as they are
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(files, tf.string, [len(files)]))
    with grpc.insecure_channel(target, OPTIONS) as channel:
        answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=30)
    out = {name: tf.make_ndarray(tensor) for name, tensor in answer.outputs.items()}
    for name, class_name, label, row in zip(
        images, out["class_name"], out["label"], out["probabilities"], strict=True
    ):
        print(f"{name}: {class_name.decode()} ({row[label]:.4f})")


if __name__ == "__main__":
    main(*sys.argv[1:])
