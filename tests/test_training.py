"""Training is a function of the seed: a run that is cut off goes on as if nothing had happened."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from madit import zoo
from madit.zoo import detail, shapes_data, train, training


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(training, "build_pipeline", lambda seed=0, build=training.build_pipeline: build(seed, 2, 2, 16))
    return training


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tiny, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny.train_shapes(whole, 4, 0, 1e-3)
    pipeline = tiny.build_pipeline(0)
    batches, model = tiny.Batches(pipeline.tokenizer, 0), tiny.Trainable(pipeline).train()

    def loss(m, step):
        if step == 2:
            raise KeyboardInterrupt
        return tiny.flow_loss(m, batches[step])

    with pytest.raises(KeyboardInterrupt):
        tiny.train(model, loss, cut, 4, checkpoint_seconds=0)
    tiny.train_shapes(cut, 4, 0, 1e-3)
    name = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    one, other = load_file(whole / name), load_file(cut / name)
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_the_command_trains_the_control_and_keeps_its_planting(tiny, tmp_path, monkeypatch):
    tiny.train_shapes(tmp_path / "shapes", 2, 0, 1e-3)
    base = tmp_path / "base.pt"
    torch.save(torch.load(tmp_path / "shapes/state.pt", weights_only=True)["ema"], base)
    monkeypatch.setattr(detail, "BLOCK", 0)  # the tiny model has two blocks
    train.main(["detail", "--out", str(tmp_path / "detail"), "--base", str(base), "--steps", "2"])
    planted = json.loads((tmp_path / "detail/planting.json").read_text())
    pipeline = zoo.load_pipeline(str(tmp_path / "detail/pipeline"))
    seen = []
    pipeline.transformer.transformer_blocks[0].register_forward_hook(lambda m, a, out: seen.append(out[1]))
    pipeline("a red circle", num_inference_steps=2, guidance_scale=1.0)
    values = seen[-1][..., planted["channels"]]
    torch.testing.assert_close(values, torch.tensor([100.0, -100.0]).expand_as(values))


def test_batches_are_a_function_of_seed_and_step():
    tokenizer = training.build_pipeline().tokenizer
    one, again, next_one = (training.Batches(tokenizer, 3)[step] for step in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], next_one[0])


def test_labels_are_independent_and_captions_name_them():
    labels = shapes_data.labels_from_index(range(shapes_data.n_combinations()))
    texts = shapes_data.captions(labels)
    assert len(set(texts)) == shapes_data.n_combinations() == 4 * 6 * 2 * 5 * 8


def test_along_training_keeps_the_snapshots():
    kept = zoo.along_training()
    assert kept.sizes["training_step"] >= 5
    assert {"mean", "mean_abs", "abs_quantile", "median_abs"} <= set(kept.data_vars)
    assert float((kept.abs_quantile / kept.median_abs).max()) < 100  # nothing massive was planted
