#!/usr/bin/env bash
# Does the server at HOST:PORT give the numbers of our exports? Each signature, by gRPC and by REST, to 1e-4.
#
#   serving/verify.sh HOST:PORT [REST_PORT] [--models saved_models]
#
# The server may be TensorFlow Serving or `medattn serve`. Exit code 0: it does, 1: it does not.
# PYTHON names a Python that has "keras-medattn[serve]"; by default this checkout's, else python3.
set -euo pipefail
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
own="$checkout/.venv/bin/python"
exec "${PYTHON:-$([[ -x "$own" ]] && echo "$own" || echo python3)}" -m keras_medattn.serve.verify "$@"
