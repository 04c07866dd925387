from __future__ import annotations

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from editing import MAKERS, inputs

from madit import DiT
from madit.passes import prediction, replay, shadow, shadow_transformer, take_rows, with_prediction


@pytest.fixture(scope="module", params=MAKERS)
def pipeline(request):
    return MAKERS[request.param]()


def test_a_shadow_computes_the_same_from_the_same_weights(pipeline):
    t = pipeline.transformer
    clone = shadow_transformer(t)
    assert [p.data_ptr() for p in clone.parameters()] == [p.data_ptr() for p in t.parameters()]
    assert list(clone.state_dict()) == list(t.state_dict())
    assert torch.equal(clone(**inputs(pipeline))[0], t(**inputs(pipeline))[0])


def test_hooks_of_blocks_act_in_a_shadow_and_its_own_do_not_leak(pipeline):
    t = pipeline.transformer
    seen = []
    on_root = t.register_forward_pre_hook(lambda m, a: seen.append("root"))
    on_block = t.transformer_blocks[0].register_forward_pre_hook(lambda m, a: seen.append("block"))
    clone = shadow_transformer(t)
    clone.transformer_blocks[1].register_forward_hook(lambda m, a, o: seen.append("shadow"))
    clone(**inputs(pipeline))
    assert seen == ["block", "shadow"]
    seen.clear()
    t(**inputs(pipeline))
    assert seen == ["root", "block"]
    on_root.remove()
    on_block.remove()


def test_replay_replaces_one_block_of_the_shadow_only(pipeline):
    t = pipeline.transformer
    arguments = inputs(pipeline)
    expected = t(**arguments)[0]
    clone = shadow_transformer(t)
    replay(clone.transformer_blocks[0], lambda **k: (k["encoder_hidden_states"], k["hidden_states"]))
    assert not torch.allclose(clone(**arguments)[0], expected, atol=1e-3)
    assert torch.equal(t(**arguments)[0], expected)


def test_nnsight_is_left_out_of_a_shadow(pipeline):
    """A pass on a shadow in the middle of a traced call does not count as a visit of any module."""
    model = DiT(pipeline).model
    t, arguments = pipeline.transformer, inputs(pipeline)
    assert all(type(vars(m)["forward"]).__module__.startswith("nnsight") for m in t.modules())
    assert not any("forward" in vars(m) for m in shadow(t).modules())
    begun, passes = [], []

    def second(module, args):
        if not begun:  # the hook acts in the shadow too
            begun.append(True)
            passes.append(shadow_transformer(t)(**{**arguments, "hidden_states": arguments["hidden_states"] * 0})[0])

    handle = t.transformer_blocks[0].register_forward_pre_hook(second)
    with model.transformer.trace(**arguments):
        seen = model.transformer.transformer_blocks[1].output.save()
    handle.remove()
    outputs = []
    handle = t.transformer_blocks[1].register_forward_hook(lambda m, a, o: outputs.append(o))
    expected = t(**arguments)[0]
    handle.remove()
    assert torch.equal(seen[1], outputs[0][1])
    assert not torch.allclose(passes[0], expected, atol=1e-3)


def test_a_forward_that_was_there_before_nnsight_stays():
    pipeline = MAKERS["sd3"]()
    block = pipeline.transformer.transformer_blocks[2]
    original, seen = type(block).forward, []

    def before(self, *args, **kwargs):
        seen.append(type(self).__name__)
        return original(self, *args, **kwargs)

    block.forward = before.__get__(block)
    expected = pipeline.transformer(**inputs(pipeline))[0]
    assert DiT(pipeline).model is not None
    clone = shadow_transformer(pipeline.transformer)
    assert torch.equal(clone(**inputs(pipeline))[0], expected)
    assert seen == ["JointTransformerBlock"] * 2


def test_take_rows_goes_into_containers_and_leaves_what_is_not_batched():
    batch, other = torch.arange(8).reshape(4, 2), torch.arange(3)
    value = {"a": [batch, other], "b": (batch, None, 1.5), "c": torch.tensor(2.0)}
    taken = take_rows(value, slice(2, 4), 4)
    assert torch.equal(taken["a"][0], batch[2:])
    assert taken["a"][1] is other
    assert torch.equal(taken["b"][0], batch[2:])
    assert taken["b"][1:] == (None, 1.5)
    assert taken["c"].item() == 2.0


def test_predictions_in_tuples_and_output_classes():
    a, b = torch.zeros(2), torch.ones(2)
    assert prediction(with_prediction((a, "rest"), b)) is b
    assert with_prediction((a, "rest"), b)[1] == "rest"
    output = with_prediction(Transformer2DModelOutput(sample=a), b)
    assert isinstance(output, Transformer2DModelOutput)
    assert prediction(output) is b
