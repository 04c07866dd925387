from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from diffusers.callbacks import SD3CFGCutoffCallback
from PIL import Image

from madit import arch
from madit.calls import track
from madit.zoo.driving import encode
from madit.zoo.small import small_flux, small_sd3

PROMPT, NEGATIVE = "a red cat", "a small blue square"


def follow(pipeline, **arguments):
    """Run the pipeline; returns the label of every call, with what the transformer received."""
    family = arch.family_of(pipeline.transformer)
    calls = []
    with track(pipeline, family) as tracker:
        # registered later, so it runs after the tracker's own hook: the label of the call under way
        handle = pipeline.transformer.register_forward_pre_hook(
            lambda m, args, kwargs: calls.append((tracker.current, kwargs)), with_kwargs=True
        )
        pipeline(PROMPT, max_sequence_length=8, output_type="latent", **arguments)
        handle.remove()
    return calls


def branches(calls):
    return [tuple(label.rows) for label, _ in calls]


def assert_rows_hold(calls, pipeline, branch, prompt):
    """The rows called `branch` received this prompt's pooled text."""
    pooled = encode(pipeline, [prompt], 8)["pooled_text"]
    for label, kwargs in calls:
        if branch in label.rows:
            assert torch.equal(kwargs["pooled_projections"][label.rows[branch]], pooled)


def assert_true_times(calls, pipeline, steps):
    """Timesteps and noise levels are those of the scheduler at each call's step."""
    scheduler = pipeline.scheduler
    family = arch.family_of(pipeline.transformer)
    assert [label.step for label, _ in calls] == list(steps)
    assert [label.index for label, _ in calls] == list(range(len(calls)))
    offset = len(scheduler.sigmas) - 1 - len(scheduler.timesteps)
    assert offset == 0
    for label, kwargs in calls:
        expected = float(scheduler.timesteps[label.step])
        assert label.timestep == pytest.approx(expected * family.timestep_scale)
        assert label.timestep == float(kwargs["timestep"][0])
        assert label.sigma == pytest.approx(expected / 1000)


def test_sd3_without_guidance_has_one_branch():
    pipeline = small_sd3()
    calls = follow(pipeline, num_inference_steps=3, guidance_scale=1.0, num_images_per_prompt=2)
    assert_true_times(calls, pipeline, range(3))
    assert [label.rows for label, _ in calls] == [{"cond": slice(0, 2)}] * 3


def test_sd3_guidance_is_one_batch_with_uncond_first():
    pipeline = small_sd3()
    calls = follow(
        pipeline, num_inference_steps=3, guidance_scale=4.0, negative_prompt=NEGATIVE, num_images_per_prompt=2
    )
    assert_true_times(calls, pipeline, range(3))
    assert all(label.rows == {"uncond": slice(0, 2), "cond": slice(2, 4)} for label, _ in calls)
    calls = follow(pipeline, num_inference_steps=2, guidance_scale=4.0, negative_prompt=NEGATIVE)
    assert_rows_hold(calls, pipeline, "cond", PROMPT)
    assert_rows_hold(calls, pipeline, "uncond", NEGATIVE)


def test_sd3_guidance_cut_off_midway():
    pipeline = small_sd3()
    calls = follow(
        pipeline,
        num_inference_steps=4,
        guidance_scale=4.0,
        callback_on_step_end=SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
        callback_on_step_end_tensor_inputs=["prompt_embeds", "pooled_prompt_embeds"],
    )
    assert branches(calls) == [("uncond", "cond")] * 2 + [("cond",)] * 2
    assert_rows_hold(calls, pipeline, "cond", PROMPT)
    assert_true_times(calls, pipeline, range(4))


def test_sd3_skip_layer_calls_have_their_own_branch():
    pipeline = small_sd3()
    calls = follow(
        pipeline, num_inference_steps=4, guidance_scale=4.0, skip_guidance_layers=[1],
        skip_layer_guidance_start=0.01, skip_layer_guidance_stop=0.7,
    )  # fmt: skip
    both, skip = ("uncond", "cond"), ("skip",)
    assert branches(calls) == [both, both, skip, both, skip, both]
    assert_true_times(calls, pipeline, [0, 1, 1, 2, 2, 3])
    assert_rows_hold(calls, pipeline, "skip", PROMPT)


def test_heun_visits_noise_levels_twice_and_counts_scheduler_steps():
    pipeline = small_sd3()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    calls = follow(pipeline, num_inference_steps=3, guidance_scale=4.0)
    assert_true_times(calls, pipeline, range(5))
    sigmas = [label.sigma for label, _ in calls]
    assert sigmas[1] == sigmas[2] < sigmas[0]
    assert sigmas[3] == sigmas[4] < sigmas[2]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_flux_true_guidance_is_two_calls_with_cond_first(scale):
    pipeline = small_flux()
    calls = follow(pipeline, num_inference_steps=2, height=32, width=32, true_cfg_scale=scale, negative_prompt=NEGATIVE)
    if scale == 1.0:
        assert branches(calls) == [("cond",)] * 2
        assert_true_times(calls, pipeline, range(2))
    else:
        assert branches(calls) == [("cond",), ("uncond",)] * 2
        assert_true_times(calls, pipeline, [0, 0, 1, 1])
        assert_rows_hold(calls, pipeline, "uncond", NEGATIVE)
    assert_rows_hold(calls, pipeline, "cond", PROMPT)


@pytest.mark.parametrize(
    ("make", "img2img"), [(small_sd3, StableDiffusion3Img2ImgPipeline), (small_flux, FluxImg2ImgPipeline)]
)
def test_image_to_image_starts_at_its_first_step(make, img2img):
    base = make()
    pipeline = img2img(**{k: v for k, v in base.components.items() if k in _arguments(img2img)})
    pipeline.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.full((32, 32, 3), 128, np.uint8))
    calls = follow(
        pipeline, image=picture, strength=0.5, num_inference_steps=4, guidance_scale=1.0, height=32, width=32
    )
    assert_true_times(calls, pipeline, [2, 3])


def _arguments(cls):
    return inspect.signature(cls.__init__).parameters


def test_a_second_run_starts_again():
    pipeline = small_sd3()
    family = arch.family_of(pipeline.transformer)
    labels = []
    with track(pipeline, family) as tracker:
        pipeline.transformer.register_forward_pre_hook(lambda m, args: labels.append(tracker.current))
        for steps in (2, 3):
            pipeline(PROMPT, max_sequence_length=8, num_inference_steps=steps, output_type="latent")
    assert [(label.index, label.step) for label in labels] == [(0, 0), (1, 1), (0, 0), (1, 1), (2, 2)]


def test_a_run_cut_short_does_not_leak_into_the_next():
    pipeline = small_flux()
    arguments = {"true_cfg_scale": 2.0, "negative_prompt": NEGATIVE, "height": 32, "width": 32}
    with track(pipeline, arch.family_of(pipeline.transformer)) as tracker:
        labels = []

        def stop_at_the_second_call(module, args):
            labels.append(tracker.current)
            if len(labels) == 2:
                raise KeyboardInterrupt

        handle = pipeline.transformer.register_forward_pre_hook(stop_at_the_second_call)
        with pytest.raises(KeyboardInterrupt):
            pipeline(PROMPT, max_sequence_length=8, num_inference_steps=2, output_type="latent", **arguments)
        handle.remove()
        pipeline.transformer.register_forward_pre_hook(lambda m, args: labels.append(tracker.current))
        pipeline(PROMPT, max_sequence_length=8, num_inference_steps=1, output_type="latent", **arguments)
    assert [tuple(label.rows) for label in labels] == [("cond",), ("uncond",), ("cond",), ("uncond",)]
    assert [label.step for label in labels] == [0, 0, 0, 0]


def test_extra_calls_are_labelled_and_do_not_count():
    pipeline = small_flux()
    family = arch.family_of(pipeline.transformer)
    labels = []
    busy = False
    with track(pipeline, family) as tracker:

        def before(module, args, kwargs):
            nonlocal busy
            labels.append(tracker.current)
            if busy:
                return
            busy = True
            with tracker.branch("degraded"):
                module(*args, **kwargs)
            busy = False
            labels.append(tracker.current)

        pipeline.transformer.register_forward_pre_hook(before, with_kwargs=True)
        pipeline(
            PROMPT, max_sequence_length=8, num_inference_steps=2, output_type="latent", height=32, width=32,
            true_cfg_scale=2.0, negative_prompt=NEGATIVE,
        )  # fmt: skip
    kinds = [next(iter(label.rows)) for label in labels]
    assert kinds == ["cond", "degraded", "cond", "uncond", "degraded", "uncond"] * 2
    assert [label.step for label in labels] == [0] * 6 + [1] * 6
    assert [label.index for label in labels if "degraded" not in label.rows][::2] == [0, 1, 2, 3]


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_undone_on_exit(fails):
    pipeline = small_sd3()
    scheduler, transformer = pipeline.scheduler, pipeline.transformer
    before = dict(scheduler.__dict__), len(transformer._forward_pre_hooks), scheduler.step, scheduler.set_timesteps
    if fails:
        with pytest.raises(ZeroDivisionError), track(pipeline, arch.family_of(transformer)):
            raise ZeroDivisionError
    else:
        with track(pipeline, arch.family_of(transformer)):
            assert scheduler.step is not before[2]
    assert (dict(scheduler.__dict__), len(transformer._forward_pre_hooks)) == before[:2]
    assert (scheduler.step, scheduler.set_timesteps) == before[2:]


def test_trackers_nest():
    pipeline = small_sd3()
    family = arch.family_of(pipeline.transformer)
    with track(pipeline, family) as outer:
        with track(pipeline, family) as inner:
            pipeline(PROMPT, max_sequence_length=8, num_inference_steps=2, output_type="latent")
            assert inner.current == outer.current
            assert outer.step == inner.step == 2
        pipeline(PROMPT, max_sequence_length=8, num_inference_steps=1, output_type="latent")
        assert (outer.step, inner.step) == (1, 2)


def test_the_same_picture_with_and_without_tracking():
    pipeline = small_sd3()

    def run():
        generator = torch.Generator().manual_seed(3)
        arguments = {"max_sequence_length": 8, "num_inference_steps": 2, "output_type": "latent"}
        return pipeline(PROMPT, generator=generator, **arguments).images

    plain = run()
    with track(pipeline, arch.family_of(pipeline.transformer)):
        assert torch.equal(run(), plain)
