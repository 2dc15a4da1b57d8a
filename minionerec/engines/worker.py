"""What runs inside vLLM's workers: weights taken from a file.

vLLM mixes `WeightLoader` into its worker class (`worker_extension_cls`), so that `self` is a worker.
"""

from __future__ import annotations

from safetensors.torch import load_file


class WeightLoader:
    """A worker that can be told to load a plain safetensors file."""

    def load_weights_file(self, path: str) -> None:
        """Take the weights of `path`, which has the names of a Hugging Face checkpoint.

        A weight that is tied to another is not in the file. On a CPU vLLM computes with packed copies of the matrices;
        reloading makes those of the layers anew, but not that of an output layer whose weight is the embedding.
        """
        self.model_runner.reload_weights(weights_iterator=iter(load_file(path).items()))
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if head is not None and head.weight.device.type == "cpu":
            head.quant_method.process_weights_after_loading(head)
