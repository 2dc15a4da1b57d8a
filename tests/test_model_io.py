import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_dataset, tiny_model, write_config
from transformers import AutoModelForCausalLM

from minionerec.common.files import InputError
from minionerec.language.models import load_model, train_tokenizer
from minionerec.training.checkpoints import choose_resume_checkpoint, find_last_checkpoint


def test_a_bf16_checkpoint_trains_in_float32(tmp_path):
    """Trap 12: the library would load, and then train, in the checkpoint's own dtype."""
    tokenizer = train_tokenizer(["some words to learn from"], 300)
    tiny_model("llama", len(tokenizer)).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    model, _ = load_model(str(tmp_path), "base_model")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"


def test_a_window_shorter_than_the_sequences_is_refused_for_training_alone(tmp_path):
    tokenizer = train_tokenizer(["some words to learn from"], 300)
    tiny_model(
        "qwen2", len(tokenizer), use_sliding_window=True, sliding_window=16, max_window_layers=0
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for longest in (None, 17):
        with pytest.raises(
            InputError, match="of 16 tokens, and prefix trees need full attention .* lower --cutoff_len"
        ):
            load_model(str(tmp_path), "base_model", longest=longest)
    load_model(str(tmp_path), "base_model", longest=16)
    model, _ = load_model(str(tmp_path), "base_model", for_training=False)
    assert model.config.sliding_window == 16


def write_checkpoint(folder, step):
    """A checkpoint-N folder with all that a run needs to go on."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.zeros(64)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(64)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [None, 0, 0.5, 0.99])
def test_the_checkpoint_before_a_broken_one_is_resumed_and_that_is_said(tmp_path, capsys, name, share):
    """Any of its files missing, empty or cut off anywhere."""
    for step in (5, 12, 20):
        broken = write_checkpoint(tmp_path, step) / name
    content = broken.read_bytes()
    broken.unlink() if share is None else broken.write_bytes(content[: int(share * len(content))])
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")
    with pytest.raises(InputError, match=f"checkpoint-20: .*{name.split('.')[0]}"):
        choose_resume_checkpoint(tmp_path, str(tmp_path / "checkpoint-20"), True)
    assert choose_resume_checkpoint(tmp_path, None, True) == str(tmp_path / "checkpoint-12")
    assert "going on from the checkpoint before it" in capsys.readouterr().out
    assert not broken.parent.exists()  # or the files of two runs would mix in it


def test_without_a_whole_checkpoint_training_begins_anew(tmp_path, capsys):
    (write_checkpoint(tmp_path, 3) / "optimizer.pt").unlink()
    assert choose_resume_checkpoint(tmp_path, None, True) is None
    assert "training begins anew" in capsys.readouterr().out
    assert find_last_checkpoint(tmp_path / "nowhere") is None


def test_the_index_is_read_by_its_full_name(tmp_path):
    """Trap 10: a name with several dots is neither cut nor looked for elsewhere, and a missing one is an error."""
    from minionerec.training.settings import SFTFlags
    from sft import sft

    paths = make_dataset(tmp_path)
    dotted = tmp_path / "toy.v2.10-2018.index.json"
    dotted.write_text(open(paths["sid_index_path"]).read())
    arguments = dict(
        base_model=write_config(tmp_path),
        train_from_scratch=True,
        train_file=paths["train_file"],
        eval_file=paths["eval_file"],
        item_meta_path=paths["item_meta_path"],
        batch_size=64,
        micro_batch_size=64,
        num_epochs=1,
    )
    sft(SFTFlags(**arguments, sid_index_path=str(dotted), output_dir=str(tmp_path / "out")))
    assert (tmp_path / "out" / "final_checkpoint" / "model.safetensors").is_file()
    dotted.unlink()
    with pytest.raises(InputError, match="toy.v2.10-2018.index.json"):
        sft(SFTFlags(**arguments, sid_index_path=str(dotted), output_dir=str(tmp_path / "other")))
