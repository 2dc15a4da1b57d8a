"""A vLLM engine that rl.py asks over HTTP, for several training processes or another machine.

python -m scripts.serve_vllm --model output/sft/final_checkpoint --port 8000
python rl.py --use_vllm True --vllm_mode server --vllm_server_base_url http://127.0.0.1:8000 ...
"""

from __future__ import annotations

from minionerec.common.cli import parse_flags, run_command
from minionerec.engines.settings import ServeFlags

if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(ServeFlags)

import signal

from minionerec.common.files import InputError
from minionerec.common.processes import say
from minionerec.engines.server import EngineServer
from minionerec.engines.vllm import VllmEngine


def serve(flags: ServeFlags) -> None:
    """Start the engine and answer until interrupted."""
    if not 0 <= flags.port < 65536:
        raise InputError(f"--port {flags.port}: must lie in 0..65535")
    engine = VllmEngine(
        flags.model,
        flags.cutoff_len,
        tensor_parallel_size=flags.tensor_parallel_size,
        gpu_memory_utilization=flags.gpu_memory_utilization,
        flag="--model",
    )
    try:
        server = EngineServer((flags.host, flags.port), engine, flags.model)
    except OSError as error:
        raise InputError(f"--host {flags.host} --port {flags.port}: cannot listen there ({error})") from None
    say(f"[serve] {flags.model} on http://{flags.host}:{server.server_port}")
    # Ended without this, as by kill, Python would leave vLLM's processes behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("[serve] interrupted")
    finally:
        engine.close()


if __name__ == "__main__":
    run_command(serve, FLAGS)
