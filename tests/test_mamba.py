"""jepa/mamba.py against the recurrence it stands for, against mamba-ssm's own code, and under hard numbers.

The comparison with mamba-ssm needs its Python files, which install without CUDA: benchmarks/requirements-reference.txt
says how.
"""

import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_trainings import ranks_of
from torch.utils.flop_counter import FlopCounterMode

from errors import BadInput
from jepa import cpu_kernel, mamba
from jepa.mamba import (
    Block,
    Mamba,
    MambaStack,
    causal_conv_silu,
    choose_mamba_backend,
    gated_scan,
    selective_scan,
    selective_scan_reference,
)


@pytest.fixture(autouse=True)
def seeded_on_plain_pytorch(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(mamba.backend, "name", "torch")


@pytest.fixture(params=["torch", "cpp"])
def backend(request, monkeypatch):
    monkeypatch.setattr(mamba.backend, "name", request.param)
    return request.param


def scan_inputs(B=2, L=17, E=8, N=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    u, b, c = (torch.randn(B, L, k, generator=g, dtype=torch.float64) for k in (E, N, N))
    delta = F.softplus(torch.randn(B, L, E, generator=g, dtype=torch.float64) - 1)
    A = -torch.exp(torch.randn(E, N, generator=g, dtype=torch.float64))
    D = torch.randn(E, generator=g, dtype=torch.float64)
    return [v.to(dtype).requires_grad_() for v in (u, delta, A, b, c, D)]


def output_and_gradients(scan, inputs):
    y = scan(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


def relative_error(found, expected):
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)).item()


# The scan


@pytest.mark.parametrize("L", [1, 12, 16, 17, 395])
def test_chunked_scan_matches_the_sequential_recurrence(L):
    inputs = scan_inputs(L=L)
    found, expected = (output_and_gradients(scan, inputs) for scan in (selective_scan, selective_scan_reference))
    for name, f, e in zip(["y", "u", "delta", "A", "B", "C", "D"], found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_splitting_the_batch_for_the_cache_changes_nothing(monkeypatch):
    inputs = scan_inputs(B=5, L=20)
    whole = output_and_gradients(selective_scan, inputs)
    monkeypatch.setattr(mamba, "CACHED_ELEMENTS", 2 * mamba.CHUNK * 8 * 4)  # slices of 2, 2 and 1 samples
    for f, e in zip(output_and_gradients(selective_scan, inputs), whole, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


def test_gradients_agree_with_finite_differences():
    assert torch.autograd.gradcheck(selective_scan, scan_inputs(B=2, L=18, E=2, N=2))


def test_float32_stays_close_to_float64():
    precise = output_and_gradients(selective_scan_reference, scan_inputs(B=2, L=200, E=32, N=16))
    single = output_and_gradients(selective_scan, scan_inputs(B=2, L=200, E=32, N=16, dtype=torch.float32))
    assert single[0].dtype == torch.float32
    assert max(relative_error(f, e) for f, e in zip(single, precise, strict=True)) < 5e-6


@pytest.mark.parametrize("dt", [1e-6, 1000.0])
def test_extreme_step_sizes_stay_finite_and_right(dt):
    def inputs(dtype):
        u, delta, A, b, c, D = scan_inputs(L=40, dtype=dtype)
        return [u, torch.full_like(delta, dt).requires_grad_(), A, b, c, D]

    found = output_and_gradients(selective_scan, inputs(torch.float32))
    expected = output_and_gradients(selective_scan_reference, inputs(torch.float64))
    for f, e in zip(found, expected, strict=True):
        assert f.isfinite().all()
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-5 * max(1.0, e.abs().max().item()))


def test_the_state_is_float32_under_bfloat16_autocast():
    inputs = [v.detach().bfloat16().requires_grad_() for v in scan_inputs(L=40)]
    expected = output_and_gradients(selective_scan, [v.detach().float().requires_grad_() for v in inputs])
    with torch.autocast("cpu", torch.bfloat16):
        y, *gradients = output_and_gradients(selective_scan, inputs)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected[0])  # nothing inside was rounded to bfloat16
    for f, e in zip(gradients, expected[1:], strict=True):
        assert torch.equal(f, e.bfloat16())


def test_nothing_is_saved_without_gradients():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.shape) or v, lambda v: v):
        with torch.no_grad():
            y = selective_scan(*scan_inputs())
        frozen = selective_scan(*(v.detach() for v in scan_inputs()))
        assert not saved and y.grad_fn is None and frozen.grad_fn is None
        selective_scan(*scan_inputs())
    assert saved  # the hook does see what training keeps


def test_training_keeps_far_less_than_all_states():
    B, L, E, N = 2, 160, 32, 16
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.numel()) or v, lambda v: v):
        selective_scan(*scan_inputs(B, L, E, N))
    assert max(saved) == B * L * E * N // mamba.CHUNK


# The mixer's operations, in plain PyTorch and in C++


def gated_inputs(B=2, L=17, E=80, N=16, last=None, dt=None):
    """float64 inputs of gated_scan: u, dt, dt_bias, A, B, C, D, gate. 80 channels are a group and a part of one."""
    g = torch.Generator().manual_seed(2)
    u, delta, A, b, c, D = scan_inputs(B, L, E, N)
    dt = torch.log(torch.expm1(delta)) if dt is None else torch.full_like(u, dt)
    dt_bias, gate = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in [(E,), (B, last or L, E)])
    inputs = [u, dt, 0.1 * dt_bias, A, b, c, D, gate]
    return [v.detach().requires_grad_() for v in inputs]


def gated_definition(u, dt, dt_bias, A, B, C, D, gate):
    y = selective_scan(u, F.softplus(dt + dt_bias), A, B, C, D)  # float64: within 1e-10 of the recurrence
    return y[:, -gate.shape[1] :] * F.silu(gate)


def single(inputs):
    return [v.detach().float().requires_grad_() for v in inputs]


def assert_close_to_float64(function, definition, inputs):
    y, *gradients = output_and_gradients(function, single(inputs))
    y_expected, *expected = output_and_gradients(definition, inputs)
    assert y.dtype == torch.float32
    assert relative_error(y, y_expected) < 1e-6
    assert max(relative_error(f, e) for f, e in zip(gradients, expected, strict=True) if e.any()) < 1e-5


@pytest.mark.parametrize("last", [None, 1])
@pytest.mark.parametrize("L", [1, 12, 17, 395, 1023])
def test_the_gated_scan_is_close_to_float64(backend, L, last):
    assert_close_to_float64(gated_scan, gated_definition, gated_inputs(L=L, last=last))


@pytest.mark.parametrize("N", [1, 5])
def test_the_gated_scan_takes_any_number_of_states(backend, N):
    assert_close_to_float64(gated_scan, gated_definition, gated_inputs(N=N))


@pytest.mark.parametrize("dt", [-13.8, 1000.0])  # softplus: step sizes 1e-6 and 1000
def test_the_gated_scan_stands_extreme_step_sizes(backend, dt):
    inputs = gated_inputs(L=40, dt=dt)
    found, expected = output_and_gradients(gated_scan, single(inputs)), output_and_gradients(gated_definition, inputs)
    for f, e in zip(found, expected, strict=True):
        assert f.isfinite().all()
        assert relative_error(f, e) < 1e-5 or e.abs().max() < 1e-30


def test_a_nan_stays_visible(backend):
    inputs = [v.detach().float() for v in gated_inputs(L=40)]
    inputs[1][0, 20, 3] = torch.nan  # a step size
    y = gated_scan(*inputs)
    assert y[0, 20:, 3].isnan().all() and y.isnan().sum() == 20


@pytest.mark.parametrize(("L", "K"), [(1, 4), (2, 4), (12, 4), (40, 2)])
def test_the_convolution_is_conv1d_cut_to_the_past(backend, L, K):
    def conv1d(x, weight, bias):
        y = F.conv1d(x.transpose(1, 2), weight, bias, padding=K - 1, groups=len(bias))
        return F.silu(y[:, :, :L].transpose(1, 2))

    inputs = [torch.randn(shape).double().requires_grad_() for shape in [(3, L, 80), (80, 1, K), (80,)]]
    assert_close_to_float64(causal_conv_silu, conv1d, inputs)


def test_the_memory_layout_of_inputs_does_not_matter(backend):
    inputs = single(gated_inputs(L=40))
    scattered = [v.detach().mT.contiguous().mT.requires_grad_() if v.dim() > 1 else v for v in inputs]
    assert not any(v.is_contiguous() for v in scattered if v.dim() > 1)
    for f, e in zip(*(output_and_gradients(gated_scan, v) for v in (scattered, inputs)), strict=True):
        assert relative_error(f, e) < 1e-6
    x, weight, bias = torch.randn(2, 80, 9).mT, torch.randn(80, 1, 4), torch.randn(80)
    torch.testing.assert_close(causal_conv_silu(x, weight, bias), causal_conv_silu(x.contiguous(), weight, bias))


def test_the_kernel_gives_the_same_bits_with_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(mamba.backend, "name", "cpp")
    threads = torch.get_num_threads()
    x = torch.randn(3, 395, 160)
    taps, bias = torch.randn(160, 1, 4), torch.randn(160)
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        convolved = output_and_gradients(causal_conv_silu, [v.clone().requires_grad_() for v in (x, taps, bias)])
        found.append(convolved + output_and_gradients(gated_scan, single(gated_inputs(B=3, L=395, E=160))))
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_what_the_kernel_does_not_take_runs_on_pytorch(monkeypatch):
    monkeypatch.setattr(mamba.backend, "name", "cpp")
    for inputs in (single(gated_inputs(E=7)), gated_inputs()):  # no whole vector of channels; float64
        y = gated_scan(*inputs)
        assert y.dtype == inputs[0].dtype
        assert torch.equal(y, gated_definition(*inputs))


def test_inference_gives_the_same_numbers_and_saves_nothing(backend):
    inputs, saved = single(gated_inputs(L=40)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.numel()) or v, lambda v: v):
        with torch.no_grad():
            y = gated_scan(*inputs)
        with torch.inference_mode():
            assert torch.equal(gated_scan(*inputs), y)
        assert not saved and y.grad_fn is None
        assert torch.equal(gated_scan(*inputs), y)
    assert max(saved) == 2 * 3 * 80 * 16  # the states at the starts of three chunks of tokens


def test_a_mixers_states_are_float32_under_autocast(backend):
    mixer, tokens = Mamba(32), torch.randn(2, 20, 32)
    saved = []
    watch = torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append((v.shape, v.dtype)) or v, lambda v: v)
    with watch, torch.autocast("cpu", torch.bfloat16):
        y = mixer(tokens)
    assert y.dtype == torch.bfloat16
    states = [dtype for shape, dtype in saved if len(shape) == 4 and shape[-2:] == (16, 64)]
    assert states == [torch.float32]
    torch.testing.assert_close(y.float(), mixer(tokens), rtol=0.05, atol=0.05)


# The mixer, the block and the stack


@pytest.mark.parametrize("with_mlp", [True, False])
@pytest.mark.parametrize("last", [1, 5])
def test_asking_for_the_last_tokens_changes_no_number(backend, last, with_mlp):
    stack, tokens = MambaStack(3, 32, 16, 4, 2, with_mlp), torch.randn(2, 37, 32, requires_grad=True)
    inputs = [tokens, *stack.parameters()]
    expected = output_and_gradients(lambda *_: stack(tokens)[:, -last:], inputs)
    for f, e in zip(output_and_gradients(lambda *_: stack(tokens, last), inputs), expected, strict=True):
        assert relative_error(f, e) < 1e-5


def test_the_last_block_spares_what_only_other_tokens_need():
    def matmul_flops(last):
        with FlopCounterMode(display=False) as counter:
            stack(tokens, last)
        return counter.get_total_flops()

    stack, tokens = MambaStack(1, 32, 16, 4, 2, with_mlp=True), torch.randn(1, 37, 32)
    block = stack.layers[0]
    spared = sum(w.numel() for w in (block.mixer.out_proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight))
    spared += block.mixer.in_proj.weight.numel() // 2  # the gate
    assert matmul_flops(None) - matmul_flops(1) == 2 * 36 * spared


def test_recomputing_activations_leaves_gradients_bit_identical_and_saves_memory(backend):
    stack, tokens = MambaStack(3, 32, 16, 4, 2, with_mlp=True), torch.randn(2, 37, 32)

    def gradients_and_saved():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.numel()) or v, lambda v: v):
            y = stack(tokens, last=1)
        return torch.autograd.grad(y.square().sum(), list(stack.parameters())), sum(saved)

    expected, kept = gradients_and_saved()
    stack.checkpoint_activations = True
    found, kept_now = gradients_and_saved()
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert kept_now < kept / 10
    stack.eval()
    assert gradients_and_saved()[1] == kept  # only in training


@torch.no_grad()
@pytest.mark.parametrize("t", [0, 5, 16, 33])
def test_a_token_leaves_everything_before_it_bit_identical(backend, t):
    stack = MambaStack(2, 32, 16, 4, 2, with_mlp=True)
    tokens = torch.randn(2, 34, 32)
    changed = tokens.clone()
    changed[:, t] += 1.0
    before, after = stack(tokens), stack(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).flatten(2).any(-1).all()  # and reaches every token from there on


def test_parameter_counts_are_the_guides():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(Mamba(256)) == 437_760
    assert count(Block(256, 16, 4, 2, with_mlp=True)) == 1_028_096
    assert count(MambaStack(12, 256, 16, 4, 2, with_mlp=True)) == 12_337_152


def test_only_A_log_and_D_are_exempt_from_weight_decay():
    parameters = Block(32, 16, 4, 2, with_mlp=True).named_parameters()
    marked = {name for name, p in parameters if hasattr(p, "_no_weight_decay")}
    assert marked == {"mixer.A_log", "mixer.D"}


def test_step_sizes_start_between_a_thousandth_and_a_tenth():
    mixer = Mamba(256)
    dt = F.softplus(mixer.dt_proj.bias.detach())
    assert dt.min() > 0.000999 and dt.max() < 0.1001
    assert dt.log().std() > 1.0  # spread over the decades, not gathered at one end
    assert mixer.dt_proj.bias._no_reinit


@pytest.mark.parametrize(("with_mlp", "branches"), [(True, 8), (False, 4)])
def test_residual_branches_start_scaled_by_their_number(with_mlp, branches):
    stack = MambaStack(4, 128, 16, 4, 2, with_mlp)
    outputs = [layer.mixer.out_proj.weight for layer in stack.layers]
    outputs += [layer.mlp.fc2.weight for layer in stack.layers] if with_mlp else []
    for weight in outputs:
        bound = (weight.shape[1] * branches) ** -0.5  # kaiming_uniform(a=sqrt(5)) draws from +- 1/sqrt(fan_in)
        assert 0.98 * bound < weight.abs().max() <= bound * (1 + 1e-6)


def test_a_stack_trains_under_bfloat16_autocast():
    stack, tokens = MambaStack(2, 32, 16, 4, 2, with_mlp=True), torch.randn(2, 20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = stack(tokens)
    torch.testing.assert_close(y.float(), stack(tokens), rtol=0.05, atol=0.05)
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in stack.parameters())


# mamba-ssm's own code


@pytest.fixture
def mamba_ssm(monkeypatch):
    """(mamba_ssm.modules.mamba_simple, mamba_ssm.ops.selective_scan_interface) without CUDA: kernels are stand-ins."""
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        pytest.skip("mamba-ssm is not installed; the command that installs it without CUDA opens this file")

    def stand_in(name, **attributes):
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    # Its __init__ imports every model of the package, most of them on triton; an empty one with its path is enough.
    stand_in("mamba_ssm", __path__=list(spec.submodule_search_locations))
    stand_in("mamba_ssm.ops.triton", __path__=[])
    stand_in("mamba_ssm.ops.triton.layer_norm", _layer_norm_fwd=None)
    stand_in("selective_scan_cuda")
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)  # an import of it fails
    kernels = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    monkeypatch.setattr(kernels, "selective_scan_fn", kernels.selective_scan_ref)
    modules = importlib.import_module("mamba_ssm.modules.mamba_simple")
    assert modules.selective_scan_fn is kernels.selective_scan_ref
    yield modules, kernels
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


def test_weights_and_outputs_are_interchangeable_with_mamba_ssm(mamba_ssm):
    modules, _ = mamba_ssm
    theirs, ours, tokens = modules.Mamba(64), Mamba(64), torch.randn(2, 37, 64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=2e-7)

    ours = Mamba(64)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=2e-7)

    for module in (ours, theirs):
        module(tokens).square().sum().backward()
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, theirs[name].grad) < 1e-5, name


def test_the_initialisation_is_mamba_ssms(mamba_ssm):
    theirs, ours = dict(mamba_ssm[0].Mamba(256).named_parameters()), dict(Mamba(256).named_parameters())
    assert theirs.keys() == ours.keys()
    for name in ours:
        assert vars(ours[name]) == vars(theirs[name]), name  # the marks _no_weight_decay and _no_reinit
        assert ours[name].std().item() == pytest.approx(theirs[name].std().item(), rel=0.2), name
        assert ours[name].mean().item() == pytest.approx(theirs[name].mean().item(), rel=0.2, abs=0.03), name


@pytest.fixture
def cuda_path(mamba_ssm, monkeypatch):
    """The code for CUDA, on the CPU: mamba-ssm's Python definitions instead of its kernels, and the kernels' types."""
    _, kernels = mamba_ssm
    calls = []

    def causal_conv1d_fn(x, weight, bias, activation):
        calls.append(("causal_conv1d_fn", x.dtype))
        assert activation == "silu"
        y = F.conv1d(x.float(), weight[:, None].float(), bias.float(), padding=3, groups=len(bias))
        return F.silu(y[..., : x.shape[-1]]).to(x.dtype)

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        calls.append(("selective_scan_fn", u.dtype))
        assert {v.dtype for v in (u, delta, B, C)} == {u.dtype}
        assert {v.dtype for v in (A, D, delta_bias)} == {torch.float32}
        return kernels.selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    monkeypatch.setattr(kernels, "causal_conv1d_fn", causal_conv1d_fn)
    monkeypatch.setattr(kernels, "selective_scan_fn", selective_scan_fn)
    monkeypatch.setattr(kernels, "mamba_inner_fn", kernels.mamba_inner_ref)
    monkeypatch.setattr(mamba.backend, "mamba_ssm", kernels)

    def switch(on: bool):
        calls.clear()
        monkeypatch.setattr(mamba, "_on_cuda_kernels", lambda x: on)
        return calls

    return switch


@pytest.mark.parametrize("last", [None, 1])
def test_the_code_for_cuda_calls_mamba_ssm_with_the_right_arguments(cuda_path, last):
    stack, tokens = MambaStack(2, 64, 16, 4, 2, with_mlp=True), torch.randn(2, 37, 64)
    results = []
    for on in (False, True):
        calls = cuda_path(on)
        y = stack(tokens, last)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(stack.parameters()))])
        assert len(calls) == (4 if on else 0)
    assert all(relative_error(f, e) < 1e-5 for e, f in zip(*results, strict=True))


@pytest.mark.parametrize("last", [None, 1])
def test_the_code_for_cuda_gives_its_kernels_bfloat16_under_autocast(cuda_path, last):
    stack, tokens = MambaStack(2, 64, 16, 4, 2, with_mlp=True), torch.randn(2, 37, 64)
    calls = cuda_path(True)
    with torch.autocast("cpu", torch.bfloat16):
        y = stack(tokens, last)
    assert len(calls) == 4 and {dtype for _, dtype in calls} == {torch.bfloat16}
    cuda_path(False)
    torch.testing.assert_close(y.float(), stack(tokens, last), rtol=0.05, atol=0.05)


# The backend


def test_asking_for_cuda_without_it_says_what_to_install():
    with pytest.raises(BadInput, match=r"the device is cpu.*pip install mamba-ssm causal-conv1d --no-build-isolation"):
        choose_mamba_backend("cuda", torch.device("cpu"))


def test_asking_for_cuda_without_the_packages_names_the_missing_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    with pytest.raises(BadInput, match="causal_conv1d"):
        choose_mamba_backend("cuda", torch.device("cuda"))


@pytest.mark.parametrize(
    ("name", "device", "chosen", "reason"),
    [
        ("auto", "cpu", "cpp", "agree with plain PyTorch"),
        ("cpp", "cpu", "cpp", "agree with plain PyTorch"),
        ("auto", "mps", "torch", "the device is mps"),
        ("torch", "cpu", "torch", "as set"),
    ],
)
def test_the_choice_is_printed_once_with_its_reason(name, device, chosen, reason, capsys):
    assert choose_mamba_backend(name, torch.device(device)) == chosen
    Mamba(16)(torch.randn(1, 3, 16))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and f"mamba backend: {chosen} (" in printed[0] and reason in printed[0]


def test_the_choice_leaves_the_random_numbers_alone():
    expected = torch.randn(3, generator=torch.Generator().manual_seed(0))
    choose_mamba_backend("auto", torch.device("cpu"))
    assert torch.equal(torch.randn(3), expected)


def test_without_a_choice_no_compiler_runs(monkeypatch):
    def refuse(*command):
        raise AssertionError(command)

    monkeypatch.setattr(cpu_kernel, "run", refuse)
    monkeypatch.setattr(cpu_kernel, "kernel", refuse)
    Mamba(16)(torch.randn(1, 3, 16))


# Building the C++ kernel


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """As on a machine where the kernel was never built: the folder that will hold it. Compiling is made quick."""
    monkeypatch.setattr(cpu_kernel, "FLAGS", [*cpu_kernel.FLAGS, "-O0"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    cpu_kernel.kernel.cache_clear()
    yield tmp_path / "statevla"
    cpu_kernel.kernel.cache_clear()


def test_without_a_compiler_pytorch_runs_and_the_reason_is_given(empty_cache, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert choose_mamba_backend("auto", torch.device("cpu")) == "torch"
    assert "torch (no C++ kernel: no C++ compiler (c++, g++, clang++))" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"mamba_backend=cpp, but no C\+\+ kernel.*install g\+\+"):
        choose_mamba_backend("cpp", torch.device("cpu"))


@pytest.mark.parametrize(
    ("correct", "broken", "reason"),
    [("store(du + at", "store(no_such_name + at", "no_such_name"), ("y[t] = load(D + e) * u_t;", "", "differ from")],
)
def test_a_kernel_that_does_not_compile_or_is_wrong_is_not_used(
    correct, broken, reason, empty_cache, monkeypatch, tmp_path, capsys
):
    source = cpu_kernel.SOURCE.read_text()
    assert correct in source
    changed = tmp_path / "changed.cpp"
    changed.write_text(source.replace(correct, broken if broken else "y[t] = Vec{};"))
    monkeypatch.setattr(cpu_kernel, "SOURCE", changed)
    assert choose_mamba_backend("auto", torch.device("cpu")) == "torch"
    assert mamba.backend.name == "torch"
    assert reason in capsys.readouterr().out


def test_the_kernel_is_built_once_for_each_kind_of_machine(empty_cache, monkeypatch):
    cpu_kernel.kernel()
    (first,) = empty_cache.iterdir()
    built = first.stat().st_mtime_ns
    cpu_kernel.kernel.cache_clear()
    cpu_kernel.kernel()
    assert [f.stat().st_mtime_ns for f in empty_cache.iterdir()] == [built]

    run = cpu_kernel.run
    monkeypatch.setattr(cpu_kernel, "run", lambda command: run(command) + "#define __OTHER_CPU__" * ("-dM" in command))
    cpu_kernel.kernel.cache_clear()
    cpu_kernel.kernel()
    assert len(list(empty_cache.iterdir())) == 2


def kernel_chosen(_rank: int) -> None:
    assert choose_mamba_backend("auto", torch.device("cpu")) == "cpp"


def test_two_processes_may_build_at_once(empty_cache, tmp_path_factory):
    ends = ranks_of(2, tmp_path_factory.mktemp("said"), kernel_chosen)
    assert [code for code, _ in ends] == [0, 0], ends
    (library,) = empty_cache.iterdir()  # one file, and no rest of the building
    assert library.stem.endswith(cpu_kernel.digest(library.read_bytes()))


def test_a_cache_folder_that_cannot_be_written_is_done_without(empty_cache, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert choose_mamba_backend("auto", torch.device("cpu")) == "cpp"


@pytest.fixture
def built(empty_cache):
    """The file of the kernel that a first start kept, and nothing of it in memory as far as the code knows."""
    cpu_kernel.kernel()
    cpu_kernel.kernel.cache_clear()
    (library,) = empty_cache.iterdir()
    return library


def test_a_damaged_kernel_is_never_loaded_and_is_built_anew(built):
    """Loading a file that was cut short ends the process with SIGBUS."""
    whole = built.read_bytes()
    key = built.stem.split("_")[-2]
    assert cpu_kernel.cached_kernel(key)
    for damaged in (whole[:5000], whole[:-1], b"", bytes(len(whole)), whole[:4096] + bytes(len(whole) - 4096)):
        built.unlink(missing_ok=True)  # the one that is in memory must stay as it is
        built.write_bytes(damaged)
        assert cpu_kernel.cached_kernel(key) is None
        assert not built.exists()
    built.write_bytes(whole[:5000])
    assert cpu_kernel.kernel().lanes() in (4, 8, 16)
    assert built.read_bytes() == whole


def test_a_kernel_that_cannot_be_loaded_here_is_built_anew(built):
    """As one that was built on a machine with a newer C library, in a home that both share."""
    foreign = b"\x7fELF of another machine"
    other = built.with_name(f"{built.stem[:-16]}{cpu_kernel.digest(foreign)}.so")
    built.unlink()
    other.write_bytes(foreign)
    assert cpu_kernel.kernel().lanes() in (4, 8, 16)
    assert sorted(built.parent.iterdir()) == sorted([built, other])  # the other machine's stays for the other machine


def wrapper(folder: Path, script: str) -> str:
    compiler = folder / "my compiler"
    compiler.write_text(f"#!/bin/bash\n{script}\n")
    compiler.chmod(0o755)
    return f"'{compiler}'"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            'if [[ " $* " == *" -shared "* ]]; then exec c++ "$@" "${0%/*}/undefined.cpp"; else exec c++ "$@"; fi',
            "undefined symbol: no_such_symbol_anywhere",
        ),
        ("kill -9 $$", "my compiler' was ended by SIGKILL"),
        ("sleep 100", "my compiler' does not end within 0.5 seconds"),
        ("printf 'x.cpp:1: error: \\xff\\xfe\\n' >&2; exit 1", "my compiler' fails: x.cpp:1: error: \ufffd\ufffd"),
        ("exit 3", "my compiler' fails: exit 3"),
    ],
)
def test_a_compiler_that_fails_in_its_own_way_is_named(script, reason, empty_cache, monkeypatch, tmp_path, capsys):
    (tmp_path / "undefined.cpp").write_text(
        'extern "C" int no_such_symbol_anywhere; int* p = &no_such_symbol_anywhere;'
    )
    monkeypatch.setenv("CXX", wrapper(tmp_path, script))
    if "sleep" in script:
        monkeypatch.setattr(cpu_kernel, "LONGEST_COMPILATION", 0.5)
    assert choose_mamba_backend("auto", torch.device("cpu")) == "torch"
    assert reason in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"^training.mamba_backend=cpp, but no C\+\+ kernel: ") as refusal:
        choose_mamba_backend("cpp", torch.device("cpu"))
    assert reason in str(refusal.value)
    assert "install g++" not in str(refusal.value)
    assert not empty_cache.exists()


@pytest.mark.parametrize("command", ["c++ 'unclosed", "no-such-compiler -O1", "."])
def test_a_setting_of_cxx_that_is_no_compiler_is_named(command, empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(OSError, match=re.escape(command)):
        cpu_kernel.kernel()
    monkeypatch.setenv("CXX", " ")  # as if it were not set
    assert cpu_kernel.find_compiler()


@pytest.mark.parametrize("home", ["unset", "relative", "a file", "not a folder to be made"])
def test_without_a_place_to_keep_the_kernel_it_is_built_at_every_start(home, empty_cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    if home == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif home == "not a folder to be made":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "" if home == "unset" else "cache")
        monkeypatch.setenv("HOME", "")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id without an entry
    assert cpu_kernel.kernel().lanes() in (4, 8, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def in_a_mount_namespace(mount: str, script: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs Python code where a file system that nobody else sees is mounted on `folder`."""
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} "$0" && exec "$@"', folder]
    return subprocess.run(
        [*command, sys.executable, "-c", script], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "TMPDIR"])
def test_a_folder_from_which_nothing_may_be_executed_is_done_without(variable, empty_cache, monkeypatch, tmp_path):
    mount, noexec = "mount -t tmpfs -o noexec,size=9m none", tmp_path / "noexec"
    noexec.mkdir()
    if not shutil.which("unshare") or in_a_mount_namespace(mount, "", noexec).returncode != 0:
        pytest.skip("this machine lets nobody mount a file system")
    monkeypatch.setenv(variable, str(noexec))
    script = (
        "import os, jepa.cpu_kernel as c; c.FLAGS += ['-O0']; "
        "print(c.kernel().lanes()); c.kernel.cache_clear(); print(c.kernel().lanes())"
    )
    ended = in_a_mount_namespace(mount, script, noexec)
    assert ended.returncode == 0, ended.stderr
    assert len(set(ended.stdout.split())) == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are for x86")
@pytest.mark.parametrize(("flag", "lanes"), [("-mno-avx", 4), ("-mno-avx512f", None)])
def test_narrower_vectors_give_the_same_numbers(flag, lanes, empty_cache, monkeypatch):
    monkeypatch.setattr(cpu_kernel, "FLAGS", [*cpu_kernel.FLAGS, "-O3", flag])
    assert cpu_kernel.kernel().lanes() == lanes or lanes is None
    monkeypatch.setattr(mamba.backend, "name", "cpp")
    assert_close_to_float64(gated_scan, gated_definition, gated_inputs(L=395, E=84))


def test_only_the_first_rank_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    choose_mamba_backend("auto", torch.device("cpu"))
    assert capsys.readouterr().out == ""
