"""scripts.average_models: the mean of weights as a whole model folder, and what has no mean."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minionerec.common.files import InputError
from minionerec.evaluation.recommender import Recommender
from scripts.average_models import AverageFlags, average_models


@pytest.fixture(scope="module")
def models(trained, tmp_path_factory):
    """The trained model, and two with other weights beside it."""
    folder, paths = tmp_path_factory.mktemp("models"), [trained.checkpoint]
    for seed in (1, 2):
        path = folder / str(seed)
        shutil.copytree(trained.checkpoint, path)
        weights, generator = load_file(path / "model.safetensors"), torch.Generator().manual_seed(seed)
        moved = {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
        save_file(moved, path / "model.safetensors", metadata={"format": "pt"})
        paths.append(str(path))
    return paths


def test_weights_are_the_mean_and_the_folder_is_whole(models, tmp_path):
    output = tmp_path / "soup" / "final_checkpoint"
    average_models(AverageFlags(models=models, output_dir=str(output)))
    found, *parts = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (output, *models))
    for name, weight in found.items():
        assert torch.allclose(weight, sum(part[name].double() for part in parts).float() / 3, atol=1e-7)
    recommender = Recommender.load(str(output))
    item = recommender.catalogue.item_ids[0]
    assert len(recommender.recommend([[item]], k=3)[0]) == 3
    card = (output / "README.md").read_text()
    assert "mean of the weights of 3 models" in card and models[2] in card and "Not measured yet" in card


def test_one_model_and_models_of_other_shapes_are_refused(models, tmp_path):
    with pytest.raises(InputError, match="--models: expected two or more"):
        average_models(AverageFlags(models=models[:1], output_dir=str(tmp_path / "a")))
    with pytest.raises(InputError, match="is one of --models"):
        average_models(AverageFlags(models=models, output_dir=models[1]))
    other = tmp_path / "other"
    shutil.copytree(models[0], other)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.config.intermediate_size += 8
    type(model)(model.config).save_pretrained(other)
    with pytest.raises(InputError, match="its layers are not those of"):
        average_models(AverageFlags(models=[models[0], str(other)], output_dir=str(tmp_path / "b")))
    assert not (tmp_path / "b").exists()
