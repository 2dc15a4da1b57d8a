"""The demo's API under many clients at once: latency, requests a second, and whether every answer is right.

Start the demo first (`bash scripts/demo.sh FOLDER`). Every client asks again as soon as it is answered, for histories
drawn from the model folder's own items. Each answer is compared with what the demo's recommender, with its default
flags, says in this process. The last line is JSON with `requests_per_s`, `p50_s`, `p99_s`, `wrong` and `failed`.

    python -m benchmarks.bench_demo --model output/quickstart/rl/final_checkpoint --clients 50 --seconds 60
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import Flags, flag, parse_flags, run_command
from minionerec.common.settings import SeedFlags


@dataclass
class DemoBenchFlags(SeedFlags, Flags):
    """Benchmark."""

    model: str = flag(help="the model folder that the demo was started with")
    url: str = flag("http://127.0.0.1:7860", "address of the demo")
    clients: int = flag(50, "clients that ask at the same time")
    seconds: float = flag(60.0, "how long they ask")
    histories: int = flag(200, "different histories")
    K: int = flag(10, "length of the lists")
    num_beams: int = flag(50, "beams of the search")


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(DemoBenchFlags)

import json
import math
import random
import threading
import time
import urllib.request
from typing import Any

import numpy as np

from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.evaluation.recommender import Recommendation
from scripts.demo import DemoFlags, load_demo_recommender

TIMEOUT = 60  # seconds of one request
TOLERANCE = 1e-3  # share of a score: what is searched together may round otherwise


def ask_demo(url: str, values: list[Any]) -> dict[str, Any]:
    """The answer of the demo's /recommend.

    Raises:
        OSError, ValueError: no answer, or none that can be read.
    """
    address = f"{url}/gradio_api/call/recommend"
    body = json.dumps({"data": values}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/{event}", timeout=TIMEOUT) as answer:
        lines = answer.read().decode().splitlines()
    done = [after for line, after in zip(lines, lines[1:], strict=False) if line == "event: complete"]
    if not done:
        raise ValueError(f"the demo answered {lines[:2]}")
    return json.loads(done[0].removeprefix("data: "))[0]


def is_right(answer: dict[str, Any], expected: list[Recommendation]) -> bool:
    """Whether an answer has the expected items; neighbours whose scores are equal to TOLERANCE may change places."""
    found = answer.get("recommendations", [])
    scores = {item.item_id: item.score for item in expected}
    return len(found) == len(expected) and all(
        math.isclose(item["score"], one.score, rel_tol=TOLERANCE)
        and math.isclose(item["score"], scores.get(item["item_id"], one.score), rel_tol=TOLERANCE)
        for item, one in zip(found, expected, strict=True)
    )


def bench_demo(flags: DemoBenchFlags) -> dict[str, Any]:
    """Ask with all clients, and return the figures of the last line."""
    recommender = load_demo_recommender(DemoFlags(model=flags.model, num_beams=flags.num_beams))
    generator, items = random.Random(flags.seed), recommender.catalogue.item_ids
    histories = [generator.choices(items, k=generator.randint(1, 10)) for _ in range(flags.histories)]
    expected = recommender.recommend(histories, flags.K)
    latencies: list[float] = []
    wrong = failed = 0
    lock = threading.Lock()
    try:
        ask_demo(flags.url, [histories[0], flags.K, True, [], flags.num_beams, None])
    except (OSError, ValueError) as error:
        raise InputError(
            f"--url {flags.url}: no demo answers there ({error}); bash scripts/demo.sh starts it"
        ) from None
    end = time.monotonic() + flags.seconds

    def be_client(number: int) -> None:
        nonlocal wrong, failed
        own = random.Random(f"{flags.seed}-{number}")
        while time.monotonic() < end:
            row = own.randrange(len(histories))
            began = time.monotonic()
            try:
                answer = ask_demo(flags.url, [histories[row], flags.K, True, [], flags.num_beams, None])
            except (OSError, ValueError):
                with lock:
                    failed += 1
                continue
            with lock:
                latencies.append(time.monotonic() - began)
                wrong += not is_right(answer, expected[row])

    began = time.monotonic()
    clients = [threading.Thread(target=be_client, args=(number,)) for number in range(flags.clients)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    seconds = time.monotonic() - began
    p50, p99 = np.percentile(latencies, (50, 99)) if latencies else (float("nan"),) * 2
    report = {
        "requests": len(latencies),
        "requests_per_s": round(len(latencies) / seconds, 2),
        "p50_s": round(float(p50), 3),
        "p99_s": round(float(p99), 3),
        "wrong": wrong,
        "failed": failed,
        "clients": flags.clients,
    }
    say(json.dumps(report))
    return report


if __name__ == "__main__":
    run_command(bench_demo, FLAGS)
