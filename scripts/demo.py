r"""A page where one builds a history and sees what a model recommends; scripts/demo.sh makes its environment.

    python -m scripts.demo --model output/quickstart/rl/final_checkpoint

Programs ask http://127.0.0.1:7860/gradio_api/call/recommend (docs/using_a_model.md has a curl line). Requests that
come together are searched as one batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import Flags, flag, parse_flags, run_command
from minionerec.evaluation.settings import PrecisionFlags


@dataclass
class DemoFlags(PrecisionFlags, Flags):
    """The demo."""

    model: str = flag(help="final_checkpoint of sft.py or rl.py")
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = flag(7860, "port to listen on")
    num_beams: int = flag(50, "most beams that the page offers")
    batch_size: int = flag(32, "requests that are searched together, at most")
    fuse: str | None = flag(
        "transitions,content", "baselines whose weight the page offers, from the tables of the model folder; None: none"
    )


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(DemoFlags)

from minionerec.common.files import InputError
from minionerec.evaluation.recommender import Recommender


def load_demo_recommender(flags: DemoFlags) -> Recommender:
    """What the demo asks: the model with baselines beside it whose weight is 0 until somebody moves the slider.

    Raises:
        InputError: no such model folder.
    """
    weights = [0.0] * len(flags.fuse.split(",")) if flags.fuse else None
    options = {"fuse": flags.fuse, "fuse_weight": weights and [1.0, *weights]}
    return Recommender.load(flags.model, num_beams=flags.num_beams, dtype=flags.dtype, **options)


def demo(flags: DemoFlags) -> None:
    """Serve the page and its API until the process is ended.

    Raises:
        InputError: no such model folder, or gradio is not installed.
    """
    recommender = load_demo_recommender(flags)
    try:
        from scripts.demo_page import STYLE, build_demo_page
    except ImportError:
        raise InputError("gradio is not installed; `bash scripts/demo.sh` makes an environment with it") from None
    page = build_demo_page(recommender, flags.model, flags.batch_size)
    page.queue(default_concurrency_limit=1, max_size=1024)
    page.launch(server_name=flags.host, server_port=flags.port, share=False, show_error=True, css=STYLE)


if __name__ == "__main__":
    run_command(demo, FLAGS)
