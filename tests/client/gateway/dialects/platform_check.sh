#!/bin/sh
# Checks an embedding endpoint as the agent platform does: three requests to one port.
# Written after the description of the platform's own check, which is not in this repository.
# Usage: platform_check.sh http://host:port MODEL DIMENSIONS
set -eu
url=$1 model=$2 dimensions=$3

post() {
    curl --silent --show-error --fail --header 'Content-Type: application/json' \
        --data "$2" "$url$1"
}

# Numbers of the vectors that a JSON answer has in a field.
lengths() {
    python3 -c '
import json, sys
found = json.load(sys.stdin)[sys.argv[1]]
rows = found if isinstance(found[0], list) else [found]
print(*(len(row) for row in rows))
' "$1"
}

check() {
    if [ "$2" != "$3" ]; then
        echo "$1: vectors of $2 numbers, not $3" >&2
        exit 1
    fi
    echo "$1: ok"
}

found=$(post /v1/embeddings/generate \
    "{\"text\": \"hello world\", \"model\": \"$model\", \"use_fallback\": true}" | lengths embedding)
check /v1/embeddings/generate "$found" "$dimensions"

found=$(post /encode '{"texts": ["hello world", "What is Triton?"]}' | lengths embeddings)
check /encode "$found" "$dimensions $dimensions"

found=$(post /api/embeddings "{\"model\": \"$model\", \"prompt\": \"hello world\"}" | lengths embedding)
check /api/embeddings "$found" "$dimensions"
