"""jepa/bf16.py and jepa/precision.py against float32 and against PyTorch's own bfloat16 products under autocast."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from config import load_config
from errors import BadInput
from jepa import bf16, cpu_kernel, mamba
from jepa.mamba import MambaStack
from jepa.precision import choose_precision, in_precision
from jepa.tokenizer import ImageTokenizer
from observation import CAMERAS
from statevla_model import RecordedDecision, build_trainer

CPU = torch.device("cpu")
SMALL = ["model.image_size=32", "model.embed_dim=64", "model.policy_embed_dim=64", "model.encoder_depth=2"]
SMALL += ["model.lang_emb_dim=16", "model.state_dim=64"]


@pytest.fixture(autouse=True)
def seeded_on_the_kernel(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(mamba.backend, "name", "cpp")


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def output_and_gradients(function, inputs):
    y = function()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach().float(), *torch.autograd.grad((y.float() * weights).sum(), inputs)]


# The kernels, each against its definition


def test_the_norm_of_a_sum_is_pytorchs_and_so_are_its_gradients():
    x, branch, weight = torch.randn(131, 80), torch.randn(131, 80).bfloat16(), torch.rand(80) + 0.5
    total, normed, scale = bf16.add_norm(x, branch, weight)
    expected = (x + branch.float()).double().requires_grad_()
    expected_weight = weight.double().requires_grad_()
    y = F.rms_norm(expected, (80,), expected_weight, eps=1e-5)
    assert torch.equal(total, x + branch.float())
    assert relative_error(normed, y) < 2e-3  # bfloat16 keeps 8 bits
    dnormed, dtotal = torch.randn(131, 80).bfloat16(), torch.randn(131, 80)
    dx, dx_rounded, dweight = bf16.add_norm_backward(dnormed, total, scale, weight, dtotal)
    of_norm, of_weight = torch.autograd.grad((y * dnormed.double()).sum(), [expected, expected_weight])
    assert relative_error(dx, of_norm + dtotal) < 1e-6
    assert relative_error(dweight, of_weight) < 1e-6
    assert torch.equal(dx_rounded, dx.bfloat16())  # rounded as PyTorch rounds


def test_the_gated_unit_is_x_times_silu_and_so_are_its_gradients():
    h, y, dh = torch.randn(70, 96).bfloat16(), torch.empty(70, 48, dtype=torch.bfloat16), torch.empty(70, 96).bfloat16()
    dy = torch.randn(70, 48).bfloat16()
    cpu_kernel.call("gated_silu_forward", h, y, 70, 48)
    cpu_kernel.call("gated_silu_backward", dy, h, dh, 70, 48)
    precise = h.double().requires_grad_()
    left, gate = precise.chunk(2, dim=1)
    expected = left * F.silu(gate)
    assert relative_error(y, expected) < 2e-3
    assert relative_error(dh, torch.autograd.grad((expected * dy.double()).sum(), precise)[0]) < 2e-3


@pytest.mark.parametrize(
    "rows, outputs, inputs", [(1, 16, 32), (35, 40, 256), (70, 256, 8), (64, 512, 128), (33, 7, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_product_is_the_matrix_product(rows, outputs, inputs, dtype):
    a, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs)
    out = torch.randn(rows, outputs).to(dtype)
    expected = a.double() @ weight.bfloat16().double().T
    added = expected + out.double()
    arguments = (a, inputs, bf16.pack(weight), out, outputs, rows, outputs, inputs)
    cpu_kernel.call(f"packed_product_{str(dtype).removeprefix('torch.')}", *arguments, 1)
    assert relative_error(out, added) < (1e-6 if dtype == torch.float32 else 3e-3)
    cpu_kernel.call(f"packed_product_{str(dtype).removeprefix('torch.')}", *arguments, 0)
    assert relative_error(out, expected) < (1e-6 if dtype == torch.float32 else 3e-3)


def test_rounding_is_pytorchs_and_a_nan_stays_visible():
    numbers = torch.randn(1, 64) * 10.0 ** torch.arange(-32, 32)
    numbers[0, :4] = torch.tensor([torch.nan, 0.0, -0.0, 1.00390625])  # the last lies in the middle: ties go to even
    branch, zero = torch.zeros(1, 64).bfloat16(), torch.zeros(1, 64)
    _, rounded, _ = bf16.add_norm_backward(branch, zero, torch.zeros(1), torch.zeros(64), numbers)
    assert torch.equal(rounded.isnan(), numbers.isnan())
    assert torch.equal(rounded.nan_to_num(), numbers.bfloat16().nan_to_num())


@pytest.mark.parametrize("gradients", [True, False])
def test_patches_times_the_weight_are_the_convolution(gradients):
    tokenizer = ImageTokenizer(image_size=32, patch_size=16, embed_dim=48)
    both_cameras = torch.randint(0, 256, (3, 2, 32, 32, 3), dtype=torch.uint8)
    for images in (both_cameras[:, 1], both_cameras[:, 0].mT.contiguous().mT):  # strided as the loader's, and scattered
        with torch.set_grad_enabled(gradients):
            with in_precision("bf16", CPU):
                found = tokenizer(images)
            expected = tokenizer(images)
            assert relative_error(found, expected) < 5e-3 and not torch.equal(found, expected)
            if gradients:
                weights = list(tokenizer.parameters())
                gradients_of = [torch.autograd.grad(y.square().sum(), weights) for y in (found, expected)]
                for f, e in zip(*gradients_of, strict=True):
                    assert relative_error(f, e) < 1e-2


# The block


@pytest.mark.parametrize("with_mlp", [True, False])
@pytest.mark.parametrize(("L", "last"), [(1, None), (12, 10), (35, 1), (70, None)])
def test_a_stack_is_as_close_to_float32_as_autocast_is(with_mlp, L, last):
    stack, tokens = MambaStack(2, 64, 16, 4, 2, with_mlp), torch.randn(3, L, 64, requires_grad=True)
    inputs = [tokens, *stack.parameters()]
    expected = output_and_gradients(lambda: stack(tokens, last), inputs)

    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return stack(tokens, last)

    def kernels():
        with in_precision("bf16", CPU):
            return stack(tokens, last)

    of_autocast, of_kernels = output_and_gradients(autocast, inputs), output_and_gradients(kernels, inputs)
    for found, usual, e in zip(of_kernels, of_autocast, expected, strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, e) < 2 * relative_error(usual, e) + 1e-3
    assert not torch.equal(of_kernels[0], expected[0])
    with torch.no_grad():  # in one call
        assert relative_error(kernels(), expected[0]) < 2 * relative_error(of_autocast[0], expected[0]) + 1e-3


def test_a_blocks_states_and_residual_stream_are_float32():
    stack, saved = MambaStack(1, 32, 16, 4, 2, with_mlp=True), []
    watch = torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append((v.shape, v.dtype)) or v, lambda v: v)
    with watch, in_precision("bf16", CPU):
        assert stack(torch.randn(2, 20, 32)).dtype == torch.float32
    assert [dtype for shape, dtype in saved if len(shape) == 4] == [torch.float32]


def test_a_nan_in_one_sample_stays_in_it():
    stack, tokens = MambaStack(2, 64, 16, 4, 2, with_mlp=True), torch.randn(3, 20, 64)
    tokens[1, 15, 7] = torch.nan
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), in_precision("bf16", CPU):
            y = stack(tokens)
        assert y[1, 15:].isnan().all() and y.isnan().sum() == 5 * 64


def test_recomputing_activations_leaves_the_gradients_of_bfloat16_bit_identical():
    stack, tokens = MambaStack(2, 64, 16, 4, 2, with_mlp=True), torch.randn(2, 20, 64)
    found = []
    for stack.checkpoint_activations in (False, True):
        with in_precision("bf16", CPU):
            y = stack(tokens, last=1)
        found.append(torch.autograd.grad(y.square().sum(), list(stack.parameters())))  # float32 by now
    assert all(torch.equal(f, e) for f, e in zip(*found, strict=True))


def test_the_kernels_give_the_same_bits_with_any_number_of_threads():
    stack, tokens = MambaStack(2, 64, 16, 4, 2, with_mlp=True), torch.randn(5, 70, 64)
    threads, found = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        with torch.no_grad(), in_precision("bf16", CPU):
            found.append(stack(tokens))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_widths_that_are_no_whole_vectors_stay_in_float32():
    stack, tokens = MambaStack(1, 20, 16, 4, 2, with_mlp=True), torch.randn(2, 9, 20)
    with in_precision("bf16", CPU):
        found = stack(tokens)
    assert torch.equal(found, stack(tokens))


def test_an_optimizers_step_is_seen_at_once():
    """Fused AdamW leaves a tensor's version as it is, so nothing made of weights may be kept by versions."""
    stack, tokens = MambaStack(1, 64, 16, 4, 2, with_mlp=True), torch.randn(2, 9, 64)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with in_precision("bf16", CPU):
            with torch.no_grad():
                inferred = stack(tokens)
            y = stack(tokens)
        assert relative_error(inferred, y) < 5e-3
        y.square().sum().backward()
        optimizer.step()


# The choice


def test_auto_on_a_cpu_is_bf16_where_it_multiplies_bfloat16_and_is_printed_with_its_reason(monkeypatch, capsys):
    for there, chosen, reason in (
        (True, "bf16", "this CPU multiplies bfloat16, and the kernels agree with float32"),
        (False, "fp32", "this CPU does not multiply bfloat16"),
    ):
        monkeypatch.setattr(cpu_kernel, "has_bfloat16_products", lambda there=there: there)
        assert choose_precision("auto", CPU) == chosen
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"precision: {chosen} ({reason}")


def test_auto_without_the_kernel_and_on_other_devices_is_fp32(monkeypatch, capsys):
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    monkeypatch.setattr(mamba.backend, "name", "torch")
    assert choose_precision("auto", CPU) == "fp32"
    assert "bf16 needs the C++ kernel" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["infer", "add_norm_backward", "by_pixel"])
def test_a_kernel_that_is_wrong_is_not_used(wrong, monkeypatch, capsys):
    right = getattr(bf16, wrong)

    def changed(*arguments):
        found = right(*arguments)
        return (found[0] * 1.5, *found[1:]) if isinstance(found, tuple) else found * 1.5

    monkeypatch.setattr(bf16, wrong, changed)
    monkeypatch.setattr(cpu_kernel, "has_bfloat16_products", lambda: True)
    assert choose_precision("auto", CPU) == "fp32"
    assert "differ from float32 by" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"^precision bf16 was asked for, but its products differ .* use fp32"):
        choose_precision("bf16", CPU)


def test_the_trial_leaves_the_random_numbers_alone():
    expected = torch.randn(3, generator=torch.Generator().manual_seed(0))
    choose_precision("bf16", CPU)
    assert torch.equal(torch.randn(3), expected)


def test_a_precision_ends_with_its_block_and_with_an_error():
    with pytest.raises(KeyError), in_precision("bf16", CPU):
        raise KeyError
    assert not mamba.backend.bfloat16
    with in_precision("bf16", CPU), in_precision("fp32", CPU):
        assert not mamba.backend.bfloat16


def test_without_the_kernel_bf16_is_autocast(monkeypatch):
    monkeypatch.setattr(mamba.backend, "name", "torch")
    with in_precision("bf16", CPU):
        assert nn.Linear(4, 4)(torch.randn(2, 4)).dtype == torch.bfloat16


# Decisions


def observation(config, batch, seed):
    g = torch.Generator().manual_seed(seed)
    pictures = [torch.randint(0, 256, (batch, 48, 48, 3), dtype=torch.uint8, generator=g) for _ in range(2)]
    return {
        "agentview_rgb": pictures[0], "eye_in_hand_rgb": pictures[1],
        "joint_states": torch.randn(batch, 7, generator=g), "gripper_states": torch.rand(batch, 2, generator=g) / 25,
        "language": torch.randn(batch, config.model.lang_emb_dim, generator=g),
    }  # fmt: skip


def test_a_decision_in_bfloat16_is_near_float32s_and_has_the_same_bits_whatever_was_asked_before():
    config = load_config(overrides=SMALL)
    model = build_trainer(config, phase=2).model.eval()
    model.state_scaling.fit(torch.randn(64, config.model.state_dim))
    model.policy.normalizer.fit(torch.rand(64, 6) * 2 - 1)
    samples = [observation(config, 1, seed) for seed in range(3)]
    x_1 = model.start_of_flow(1, "zero")
    decide, again = (RecordedDecision(model, samples[0], 4, "bf16") for _ in range(2))
    first = [decide(obs, x_1) for obs in samples]
    for i in (2, 0, 1, 1):
        assert torch.equal(decide(samples[i], x_1), first[i])
        assert torch.equal(again(samples[i], x_1), first[i])
    plain = RecordedDecision(model, samples[0], 4)
    for obs, found in zip(samples, first, strict=True):
        expected = plain(obs, x_1)
        assert not torch.equal(found, expected)
        assert (found[..., :6] - expected[..., :6]).abs().max() < 0.02
        assert torch.equal(expected, model.predict(obs, flow_start="zero"))  # fp32 unless asked
    assert not mamba.backend.bfloat16 and mamba.backend.packed is None


def test_a_recorded_decision_takes_pictures_of_any_size_and_decides_as_the_model_does():
    """On CUDA, whose graph has the shapes of its first observation; here its replay is a call on the same buffers."""
    config = load_config(overrides=SMALL)
    model = build_trainer(config, phase=2).model.eval()
    model.state_scaling.fit(torch.randn(64, config.model.state_dim))
    model.policy.normalizer.fit(torch.rand(64, 6) * 2 - 1)
    sizes = {size: observation(config, 1, size) for size in (48, config.model.image_size, 20, 224)}
    for size, obs in sizes.items():
        for camera in CAMERAS:
            obs[camera] = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8)
    x_1 = model.start_of_flow(1, "zero")
    decision = RecordedDecision(model, sizes[48], 4)
    decision.obs = {name: value.clone() for name, value in decision._at_one_size(sizes[48]).items()}
    decision.x_1, decision.actions = x_1.clone(), torch.zeros(1, config.model.action_seq_len, 7)

    class Graph:
        def replay(self) -> None:
            decision.actions.copy_(decision._decide(decision.obs, decision.x_1))

    decision.graph = Graph()
    found = [decision(obs, x_1) for obs in sizes.values()]
    for actions, obs in zip(found, sizes.values(), strict=True):
        assert torch.equal(actions, model.predict(obs, flow_start="zero"))
    assert len({tuple(actions.flatten().tolist()) for actions in found}) == len(found)


# Threads


@pytest.mark.skipif(sys.platform != "linux", reason="GCC's OpenMP is PyTorch's on Linux")
def test_training_lets_waiting_threads_sleep_soon():
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for asked, found in ((None, "1000"), ("77", "77")):
        environment |= {"OMP_DISPLAY_ENV": "verbose"} | ({"GOMP_SPINCOUNT": asked} if asked else {})
        ended = subprocess.run(
            [sys.executable, "train.py", "--help"],
            cwd=Path(__file__).parent.parent,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert f"GOMP_SPINCOUNT = '{found}'" in ended.stderr  # OpenMP itself says what it has read
