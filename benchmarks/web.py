"""Does the server lose anything? A soak of 1,000 requests from 8 clients, with cancels, bad bodies and dropped
connections; and what it adds to the time of a picture beside generate() in the same process.

    OMP_NUM_THREADS=1 python -m benchmarks.web
"""

import base64
import io
import json
import random
import socket
import statistics
import threading
import time
from collections import Counter
from http.client import HTTPConnection

import numpy as np
import uvicorn
from PIL import Image

import model_loader
from benchmarks.measure import machine, resident_memory, table, timed, write
from extensions.studio import Limits, Studio
from extensions.web import bind, create_app
from pipeline import generate

CLIENTS, REQUESTS, SEEDS = 8, 1000, 12
PROMPT, STEPS, SIDE, OVERHEAD_STEPS, ROUNDS = "rocket emoji, noto style", 2, 64, 20, 11
PATH = "/sdapi/v1/txt2img"
BAD = [b"{", b"[]", b'{"steps": "many"}', b'{"sampler_name": "nothing"}', b'{"prompt": 5}', b"[" * 100_000,
       b'{"prompt": "<lora:../x:1>"}', b'{"width": 1000000}']
KINDS = {"picture": 70, "interrupted": 8, "bad body": 12, "dropped": 10}  # in a hundred


def main():
    models = model_loader.preload_models_from_standard_weights(
        model_loader.ROOT / "data" / "emoji.safetensors", "cpu", "float32")
    studio = Studio(model_loader.ROOT / "data" / "emoji.safetensors", "float32", limits=Limits(waiting=4), device="cpu")
    expected = {seed: draw(models, seed, STEPS, SIDE) for seed in range(SEEDS)}
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(studio, page=False), log_level="critical"))
    threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True).start()
    address = sock.getsockname()[:2]
    while not server.started:
        time.sleep(0.05)
    for _ in range(3):
        fetch(address, body(0, STEPS))

    overhead = measure_overhead(models, address)
    where = machine("fastapi", "uvicorn")
    began = time.perf_counter()
    counts, memory = soak(address, expected)
    write("web.md", report(overhead, counts, memory, time.perf_counter() - began, where))
    server.should_exit = True
    studio.close()


def draw(models, seed, steps, side=128):
    return generate(PROMPT, models=models, seed=seed, n_inference_steps=steps, sampler_name="euler", height=side,
                    width=side, progress=False)


def body(seed, steps, side=128):
    return json.dumps({"prompt": PROMPT, "seed": seed, "steps": steps, "sampler_name": "Euler", "height": side,
                       "width": side}).encode()


def fetch(address, content, path=PATH):
    """Returns (status, the answer as bytes)."""
    connection = HTTPConnection(*address, timeout=600)
    connection.request("POST", path, content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    result = answer.status, answer.read()
    connection.close()
    return result


def measure_overhead(models, address):
    """Returns, for generate() and for a request for the same, the seconds that passed and those of the processor in
    each round. The latter are the same on a machine that is busy with other things."""
    alone, served = [], []
    for k in range(ROUNDS + 1):
        for seconds, function in [(alone, lambda k=k: draw(models, k, OVERHEAD_STEPS)),
                                  (served, lambda k=k: fetch(address, body(k, OVERHEAD_STEPS)))]:
            began = time.process_time()
            seconds.append((timed(function), time.process_time() - began))
        print(f"round {k}: {alone[-1]} s alone, {served[-1]} s served" + " (warm-up)" * (k == 0), flush=True)
    return alone[1:], served[1:]


def soak(address, expected):
    """Returns how often what happened, and the resident memory in MiB after each hundred requests."""
    counts, memory, numbers, lock = Counter(), [], iter(range(REQUESTS)), threading.Lock()

    def client(random):
        while True:
            with lock:
                number = next(numbers, None)
                if number is None:
                    return
                if number % 100 == 0:
                    memory.append(resident_memory("VmRSS"))
                    print(f"{number} requests, {memory[-1]:.0f} MiB, {dict(counts)}", flush=True)
            kind, = random.choices(list(KINDS), KINDS.values())
            outcome = ask(address, kind, random, expected)
            with lock:
                counts[kind, outcome] += 1

    threads = [threading.Thread(target=client, args=(random.Random(k),)) for k in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts, [*memory, resident_memory("VmRSS")]


def ask(address, kind, random, expected):
    """Makes one request of a kind; returns what came of it."""
    seed = random.randrange(SEEDS)
    if kind == "bad body":
        status, _ = fetch(address, random.choice(BAD))
        return "refused (4xx)" if 400 <= status < 500 and status != 429 else f"status {status}"
    if kind == "dropped":
        with socket.create_connection(address) as connection:
            content = body(seed, STEPS, SIDE)
            connection.sendall(f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                               f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
            time.sleep(random.random() / 2)
        return "gone"
    if kind == "interrupted":  # whichever picture is under way
        status, _ = fetch(address, b"", "/sdapi/v1/interrupt")
        return "answered" if status == 200 else f"status {status}"
    while True:
        status, answer = fetch(address, body(seed, STEPS, SIDE))
        if status != 429:
            break
        time.sleep(0.05 + random.random() / 5)
    if status != 200:
        return f"status {status}"
    answer = json.loads(answer)
    info = json.loads(answer["info"])
    if info["all_seeds"] in ([], [seed]) and (not answer["images"] or "Stopped: after" in info["infotexts"][0]):
        return "cut short by somebody's interrupt"
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))))
    return "the right picture" if np.array_equal(image, expected[seed]) else "A WRONG PICTURE"


def tell_overhead(alone, served):
    def compare(column):
        ours, theirs = ([seconds[column] for seconds in rounds] for rounds in (served, alone))
        ratio = statistics.median(a / b for a, b in zip(ours, theirs))
        return f"{statistics.median(theirs):.2f} s, {statistics.median(ours):.2f} s, median of the ratios {ratio:.3f}"

    return (f"A picture of {OVERHEAD_STEPS} steps by the model in the box, by generate() and by the server in the same "
            f"process, medians of {ROUNDS} rounds in turn: {compare(1)} (of the processor); {compare(0)} (passed, on a "
            f"machine with other work).")


def report(overhead, counts, memory, seconds, where):
    rows = [(kind, outcome, n) for (kind, outcome), n in sorted(counts.items())]
    return "\n\n".join([
        tell_overhead(*overhead),
        f"{REQUESTS} requests from {CLIENTS} clients at a time in {seconds:.0f} s ({STEPS} steps, {SIDE}x{SIDE} px; "
        f"pictures compared with generate()'s of the same seed, byte for byte; who finds the queue full asks again):",
        table(["request", "what came of it", "times"], rows),
        f"Resident memory after each hundred, MiB: {', '.join(f'{size:.0f}' for size in memory)}.",
        f"Clients, server and networks in one process; {where}; another process had one of the "
        f"two cores."])


if __name__ == "__main__":
    main()
