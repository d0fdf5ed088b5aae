#!/usr/bin/env bash
# Ask a TensorFlow Serving about one image with curl: predict_curl.sh http://HOST:PORT MODEL IMAGE [SIGNATURE]
# The answer is JSON. The image goes through a pipe: as an argument a large one would be too long for the shell.
set -euo pipefail
server=$1 model=$2 image=$3 signature=${4:-serving_default}
{
    printf '{"signature_name": "%s", "instances": [{"b64": "' "$signature"
    base64 -w0 "$image"
    printf '"}]}'
} | curl --silent --show-error --fail-with-body --max-time 30 --retry 4 --retry-connrefused \
    --header "Content-Type: application/json" --data-binary @- "$server/v1/models/$model:predict"
