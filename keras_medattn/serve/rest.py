"""TensorFlow Serving's REST interface, and the page that Prometheus reads."""

import json
import logging
import re
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from google.protobuf import json_format

from keras_medattn.serve import rest_json, services
from keras_medattn.serve.calls import Calls
from keras_medattn.serve.protos import get_model_metadata_pb2, get_model_status_pb2, grpc, predict_pb2
from keras_medattn.serve.repository import Repository
from keras_medattn.serve.servables import DEFAULT_SIGNATURE, RequestError, invalid

log = logging.getLogger("keras_medattn.serve")

METRICS_PATH = "/monitoring/prometheus/metrics"
_VERSION = r"(?:/(?:versions/(?P<version>[0-9]+)|labels/(?P<label>[^/:]+)))?"
_PREDICT = re.compile(
    rf"/v1/models/(?P<name>[^/:]+){_VERSION}:(?P<method>predict|classify|regress)", re.IGNORECASE
)
_MODEL = re.compile(rf"/v1/models(?:/(?P<name>[^/:]+))?{_VERSION}(?P<metadata>/metadata)?", re.IGNORECASE)
# As TensorFlow Serving's http_server.cc; what is not here is 500.
_HTTP = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


class Rest(ThreadingHTTPServer):
    """Answers over HTTP; a thread a connection.

    Args:
        address: (host, port) to listen at.
        models: what is served.
        calls: the places of predictions, shared with gRPC.
        max_bytes: largest request.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], models: Repository, calls: Calls, max_bytes: int) -> None:
        super().__init__(address, _Handler)
        self.models = models
        self.calls = calls
        self.max_bytes = max_bytes
        self.stopping = False
        self._connections: set[socket.socket] = set()
        self._busy = 0
        self._idle = threading.Condition()

    def start(self) -> None:
        """Answers in a thread of its own."""
        threading.Thread(target=self.serve_forever, args=(0.1,), name="rest", daemon=True).start()

    def stop(self, grace: float) -> bool:
        """Takes no more connections, and answers whether those it has had their answers in time."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        with self._idle:
            done = self._idle.wait_for(lambda: self._busy == 0, grace)
            # Else one that is kept alive could bring a request that nobody is left to answer.
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)
            return done and self._idle.wait_for(lambda: self._busy == 0, grace)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers a connection until it ends."""
        with self._idle:
            self._connections.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._idle:
                self._connections.discard(request)

    def __enter__(self) -> "Rest":
        with self._idle:
            self._busy += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._idle:
            self._busy -= 1
            self._idle.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs a connection that broke; nobody is left to answer."""
        log.info("REST: the connection of %s broke", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Rest
    protocol_version = "HTTP/1.1"
    # Seconds for a connection on which nothing comes.
    timeout = 30
    # Else the answer's body waits for the acknowledgement of its headers.
    disable_nagle_algorithm = True
    # Bytes of a refused body that may still come.
    _unread = 0

    def do_GET(self) -> None:
        with self.server:
            path = unquote(urlsplit(self.path).path)
            if path == METRICS_PATH:
                page = self.server.calls.monitor.text(
                    (name, number)
                    for name, served in sorted(self.server.models.served.items())
                    for number in sorted(served)
                )
                self._send(200, page.encode(), "text/plain; version=0.0.4")
            else:
                self._answer(path, _MODEL, self._about)

    def do_POST(self) -> None:
        with self.server:
            self._answer(unquote(urlsplit(self.path).path), _PREDICT, self._predict)

    def _answer(self, path: str, pattern: re.Pattern, method: Any) -> None:
        try:
            body = self._body()
            if found := pattern.fullmatch(path):
                self._send_json(200, method(found.groupdict(), body))
            elif path.lower().startswith("/v1/"):
                raise invalid(f"Malformed request: {self.command} {path}")
            else:
                self._send_json(404, {"error": f"Not found: {path}. Models are under /v1/models/"})
        except RequestError as error:
            self._send_json(_HTTP.get(error.code.name, 500), {"error": str(error)})

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,18}", length):
            self.close_connection = True
            raise invalid("A request must say its Content-Length; chunked bodies are not taken.")
        if int(length) > self.server.max_bytes:
            self.close_connection = True
            self._unread = min(int(length), 2 * self.server.max_bytes)
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"A request may have {self.server.max_bytes} bytes at most. Received: {length}",
            )
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            raise invalid(f"The body ends after {len(body)} of {length} bytes.")
        return body

    def _about(self, named: dict[str, Any], _: bytes) -> dict[str, Any]:
        method = "GetModelMetadata" if named["metadata"] else "GetModelStatus"
        with self.server.calls.answering(named["name"] or "", method, "REST"):
            if not named["name"]:
                raise invalid("Missing model name in request.")
            if named["metadata"]:
                request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
                _fill(request.model_spec, named)
                response = _json(services.metadata(self.server.models, request))
                # As TensorFlow Serving, which writes the packed message as a plain one.
                response["metadata"]["signature_def"].pop("@type")
                return response
            request = get_model_status_pb2.GetModelStatusRequest()
            _fill(request.model_spec, named)
            response = _json(services.status(self.server.models, request))
            for one in response["model_version_status"]:
                one.setdefault("status", {"error_code": "OK", "error_message": ""})
            return response

    def _predict(self, named: dict[str, Any], body: bytes) -> dict[str, Any]:
        method = named["method"].capitalize()
        with self.server.calls.answering(named["name"], method, "REST"):
            spec = predict_pb2.PredictRequest().model_spec
            _fill(spec, named)
            document = rest_json.parse(body)
            spec.signature_name = document.get("signature_name", "")
            if method != "Predict":
                kind = {"Classify": "classification", "Regress": "regression"}[method]
                services.refuse_method(self.server.models, spec, kind)
            with self.server.calls.place():
                model = self.server.models.find(spec)
                key = spec.signature_name or DEFAULT_SIGNATURE
                arrays, rows = rest_json.inputs(document, model.inputs(key))
                return rest_json.answer(model.run(key, arrays), rows)

    def _send_json(self, code: int, answer: dict[str, Any]) -> None:
        self._send(code, json.dumps(answer).encode(), "application/json")

    def _send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection or self.server.stopping:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def handle_expect_100(self) -> bool:
        """Asks for the body, unless the answer is a refusal."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length) or int(length) > self.server.max_bytes:
            return True
        return super().handle_expect_100()

    def finish(self) -> None:
        """Reads on after a refusal: who still sends would see a broken connection in place of the answer."""
        with suppress(OSError):
            while self._unread > 0 and (chunk := self.rfile.read1(1 << 16)):
                self._unread -= len(chunk)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of each request: what goes wrong is logged where it does."""


def _fill(spec: Any, named: dict[str, Any]) -> None:
    spec.name = named["name"]
    if named["version"]:
        if len(named["version"]) > 18:
            raise invalid(f"Failed to convert version: {named['version']} to numeric.")
        spec.version.value = int(named["version"])
    if named["label"]:
        spec.version_label = named["label"]


def _json(message: Any) -> dict[str, Any]:
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
