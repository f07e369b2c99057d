from __future__ import annotations

import dataclasses

import peft
import pytest
import torch

from models.dit import DiT, rotaries
from models.sizes import DiTConfig

SMALL = DiTConfig(channels=6, width=32, depth=3, multistream_depth=2, heads=2, hidden_width=64, time_features=16)
WITH_TEXT = dataclasses.replace(SMALL, text_width=10, text_tokens=5)


def random_dit(config: DiTConfig = WITH_TEXT, seed: int = 0) -> DiT:
    """A DiT in which nothing is zero, as a trained one."""
    torch.manual_seed(seed)
    dit = DiT(config).eval()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return dit


def inputs(batch: int = 2, frames: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 6, frames, generator=generator), torch.rand(batch, generator=generator)


def text_inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    text = torch.randn(batch, 5, 10, generator=torch.Generator().manual_seed(2))
    return {"text": text, "text_mask": torch.tensor([[1, 1, 1, 0, 0]]).expand(batch, -1)}


def test_fresh_dit_predicts_zero_and_its_blocks_change_nothing():
    torch.manual_seed(0)
    dit = DiT(WITH_TEXT)
    assert dit(*inputs(), **text_inputs()).abs().max() == 0
    x, text, time = torch.randn(2, 9, 32), torch.randn(2, 5, 32), torch.randn(2, 1, 32)
    multi, single = rotaries(WITH_TEXT, 8, device=x.device)
    assert torch.equal(dit.blocks[0](x, text, time, multi)[0], x)
    assert torch.equal(dit.blocks[0](x, text, time, multi)[1], text)
    both = torch.cat((x, text), 1)
    assert torch.equal(dit.blocks[2](both, time, single), both)


@pytest.mark.parametrize("config", [SMALL, WITH_TEXT, dataclasses.replace(WITH_TEXT, patch_size=2, memory_tokens=0)])
def test_trains_from_scratch(config):
    torch.manual_seed(0)
    dit, (x, t) = DiT(config), inputs(batch=8)
    target = torch.tanh(x.roll(1, dims=2)) * t[:, None, None]
    optimizer = torch.optim.AdamW(dit.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (dit(x, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_every_weight_gets_a_gradient():
    dit = random_dit()
    dit(*inputs(), **text_inputs()).square().sum().backward()
    assert [name for name, value in dit.named_parameters() if value.grad is None or value.grad.abs().max() == 0] == []


def test_no_text_is_a_fully_masked_text():
    dit = random_dit()
    x, t = inputs()
    text = text_inputs()["text"]
    masked = dit(x, t, text=text, text_mask=torch.zeros(2, 5))
    torch.testing.assert_close(dit(x, t), masked)
    assert not torch.allclose(dit(x, t), dit(x, t, text=text), atol=1e-3)


def test_masked_text_does_not_matter_and_real_text_does():
    dit = random_dit()
    x, t = inputs()
    given = text_inputs()
    other = given["text"].clone()
    other[:, 3:] += 100
    expected = dit(x, t, **given)
    assert torch.equal(dit(x, t, text=other, text_mask=given["text_mask"]), expected)
    other[:, 0] += 1
    assert not torch.allclose(dit(x, t, text=other, text_mask=given["text_mask"]), expected, atol=1e-3)
    everything_real = dit(x, t, text=given["text"], text_mask=torch.ones(2, 5))
    assert torch.equal(dit(x, t, text=given["text"]), everything_real)


def test_condition_is_added_frame_by_frame_to_the_projected_input():
    dit = random_dit()
    x, t = inputs()
    shift = torch.randn(2, 6, 12)
    condition = torch.einsum("bct,dc->bdt", shift, dit.input.weight)
    torch.testing.assert_close(dit(x, t, condition=condition), dit(x + shift, t), atol=1e-4, rtol=1e-4)
    assert torch.equal(dit(x, t, condition=torch.zeros(2, 32, 12)), dit(x, t))


def test_samples_of_a_batch_do_not_meet():
    dit = random_dit()
    x, t = inputs(batch=3)
    together = dit(x, t, **text_inputs(3))
    alone = [dit(x[i : i + 1], t[i : i + 1], **{k: v[i : i + 1] for k, v in text_inputs(3).items()}) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("frames", [1, 7, 80])
def test_any_length(frames):
    dit = random_dit(dataclasses.replace(WITH_TEXT, rotary_span=40, yarn_trained_tokens=20))
    x, t = inputs(frames=frames)
    prediction = dit(x, t, **text_inputs())
    assert prediction.shape == x.shape
    assert prediction.isfinite().all()


def test_position_and_noise_level_matter():
    dit = random_dit(SMALL)
    x, t = inputs()
    flipped = dit(x.flip(2), t).flip(2)
    assert not torch.allclose(flipped, dit(x, t), atol=1e-3)
    assert not torch.allclose(dit(x, t + 0.1), dit(x, t), atol=1e-3)
    without_positions = random_dit(dataclasses.replace(SMALL, rotary_width=0))
    torch.testing.assert_close(without_positions(x.flip(2), t).flip(2), without_positions(x, t), atol=1e-4, rtol=1e-4)


def test_patches_keep_frames_in_their_place():
    dit = random_dit(dataclasses.replace(SMALL, patch_size=3, memory_tokens=0, rotary_width=0))
    x, t = inputs()
    swapped = torch.cat((x[..., 3:6], x[..., :3], x[..., 6:]), -1)
    prediction = dit(x, t)
    expected = torch.cat((prediction[..., 3:6], prediction[..., :3], prediction[..., 6:]), -1)
    torch.testing.assert_close(dit(swapped, t), expected, atol=1e-4, rtol=1e-4)


def test_patches_round_trip_through_the_projections():
    dit = DiT(dataclasses.replace(SMALL, patch_size=2, width=12, memory_tokens=0, depth=1))
    with torch.no_grad():
        for linear in (dit.input, dit.output):
            linear.weight.copy_(torch.eye(12))
            linear.bias.zero_()
    x, t = inputs()
    tokens = torch.nn.functional.layer_norm(x.unflatten(2, (6, 2)).permute(0, 2, 3, 1).flatten(2), (12,), eps=1e-6)
    expected = tokens.unflatten(2, (2, 6)).permute(0, 3, 1, 2).flatten(2)
    torch.testing.assert_close(dit(x, t), expected)


def test_gated_skip_carries_what_tokens_are_too_narrow_for():
    """Tokens of 4 features for patches of 24 numbers: only the skip can pass all of them on, each with its own gain."""
    torch.manual_seed(0)
    dit = DiT(dataclasses.replace(SMALL, width=4, heads=2, patch_size=4, gated_skip=True))
    x, t = inputs()
    assert dit(x, t).abs().max() == 0
    gains = torch.linspace(-1, 1, 24)
    with torch.no_grad():
        dit.skip.bias.copy_(gains)
    expected = x.unflatten(2, (-1, 4)) * gains.view(4, 6).T[:, None]
    torch.testing.assert_close(dit(x, t), expected.flatten(2))


@pytest.mark.parametrize("config", [SMALL, WITH_TEXT, dataclasses.replace(SMALL, gated_skip=True)])
def test_lora_reaches_attention_mlps_and_the_last_layer_and_changes_nothing_at_the_start(config):
    dit = random_dit(config)
    x, t = inputs()
    before = dit(x, t)
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=list(DiT.lora_targets)), dit)
    assert torch.equal(adapted(x, t), before)

    linear = {n for n, m in dit.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    in_blocks = {
        n.removesuffix(".base_layer")
        for n, m in dit.blocks.named_modules(prefix="blocks")
        if isinstance(m, torch.nn.Linear) and "lora" not in n and "modulation" not in n
    }
    assert linear == in_blocks | {"output"} | ({"skip"} if config.gated_skip else set())
    trained = {n for n, p in dit.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    adapted(x, t).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in dit.named_parameters() if "lora_B" in n)


def test_meta_device_and_fresh_start():
    with torch.device("meta"):
        dit = DiT(WITH_TEXT)
    assert not list(dit.buffers())
    expected = DiT(WITH_TEXT)
    for fresh in (dit.to_empty(device="cpu"), expected):
        torch.manual_seed(3)
        fresh.reset_parameters()
    torch.testing.assert_close(dit.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_half_width_weights_and_autocast_answer_in_float32():
    dit = random_dit()
    x, t = inputs()
    exact = dit(x, t, condition=torch.ones(2, 32, 12), **text_inputs())
    with torch.autocast("cpu", torch.bfloat16):
        autocast = dit(x, t, condition=torch.ones(2, 32, 12), **text_inputs())
    narrow = dit.bfloat16()(x, t, condition=torch.ones(2, 32, 12), **text_inputs())
    for prediction in (autocast, narrow):
        assert prediction.dtype == torch.float32
        assert (prediction - exact).norm() < 0.1 * exact.norm()


def test_works_in_training_after_inference_mode():
    dit = random_dit()
    x, t = inputs()
    with torch.inference_mode():
        dit(x, t)
    dit(x, t).sum().backward()


def test_compiles_without_a_graph_break():
    dit = random_dit()
    compiled = torch.compile(dit, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs(), **text_inputs()), dit(*inputs(), **text_inputs()))


def test_logvar():
    dit = random_dit(dataclasses.replace(SMALL, predicts_logvar=True))
    t = torch.tensor([0.1, 0.5, 0.9])
    assert dit.logvar(t).shape == (3,)
    assert dit.logvar(t).unique().numel() == 3
    with pytest.raises(ValueError, match="predicts_logvar=True"):
        random_dit(SMALL).logvar(t)


X, T = inputs()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"float32 \(6, 12\).*\(batch, 6, frames\)"),
        ({"x": X[:, :5]}, r"\(2, 5, 12\)"),
        ({"x": X.long()}, "int64.*takes floats"),
        ({"x": X[..., :0]}, "0 frames"),
        ({"t": T[:1]}, r"t is float32 \(1,\): it must be \(2,\)"),
        ({"t": T[0]}, r"t is float32 \(\)"),
        ({"text": torch.zeros(2, 4, 10)}, r"text is .*must be \(2, 5, 10\)"),
        ({"text": torch.zeros(1, 5, 10)}, r"text is .*must be \(2, 5, 10\)"),
        ({"text": torch.zeros(2, 5, 10), "text_mask": torch.ones(2, 4)}, r"text_mask is .*must be \(2, 5\)"),
        ({"text_mask": torch.ones(2, 5)}, "text_mask without text"),
        ({"condition": torch.zeros(2, 32, 11)}, r"condition is .*must be \(2, 32, 12\)"),
    ],
)
def test_wrong_shapes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_dit()(**{"x": X, "t": T} | arguments)


def test_text_for_a_dit_without_text_is_refused():
    with pytest.raises(ValueError, match="no text stream: set text_width"):
        random_dit(SMALL)(X, T, text=torch.zeros(2, 5, 10))


def test_frames_that_do_not_fill_the_patches_are_refused():
    dit = random_dit(dataclasses.replace(SMALL, patch_size=5))
    with pytest.raises(ValueError, match="12 frames are not a multiple of patch_size 5: crop or pad"):
        dit(X, T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30, "heads": 4}, "take a multiple of 8"),
        ({"width": 24, "heads": 8}, "take a multiple of 16"),
        ({"rotary_width": 18}, "up to 16"),
        ({"rotary_width": 7}, "even number"),
        ({"text_width": 4, "multistream_depth": 9}, "multistream_depth is 9"),
        ({"time_features": 3}, "time_features is 3"),
        ({"depth": 0, "patch_size": 0}, "depth is 0.*patch_size is 0"),
        ({"memory_tokens": -1, "time_features": 3}, "time_features.*memory_tokens is -1"),
    ],
)
def test_impossible_configs_are_refused_with_all_problems(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)
