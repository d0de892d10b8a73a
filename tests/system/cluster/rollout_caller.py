"""Embeds through a name of several servers until its input ends; prints what it got as JSON."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter

from halimede import Embedder

THREADS = 8
PAUSE_S = 0.05


def main(url: str, model: str) -> None:
    ended = threading.Event()
    errors: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    given = {"provider": "triton", "model_id": model, "url": url}

    def call(embedder: Embedder) -> None:
        while not ended.is_set():
            try:
                embedder.embed("a text")
                answers["answers"] += 1
            except Exception as error:  # whatever a caller would see
                errors[f"{type(error).__name__}: {error}"] += 1
            time.sleep(PAUSE_S)

    with Embedder(config={"models": {"m": given}}) as embedder:
        embedder.embed("the first")
        print("asking", flush=True)
        threads = [threading.Thread(target=call, args=(embedder,)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        ended.set()
        for thread in threads:
            thread.join()
    print(json.dumps({**answers, "errors": errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
