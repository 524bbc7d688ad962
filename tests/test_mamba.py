"""jepa/mamba.py against the recurrence it stands for, against mamba-ssm's own code, and under hard numbers.

The comparison with mamba-ssm needs its Python files, which install without CUDA:
MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install mamba-ssm==2.3.2.post1 --no-build-isolation --no-deps
"""

import importlib
import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from errors import BadInput
from jepa import mamba
from jepa.mamba import Block, Mamba, MambaStack, choose_mamba_backend, selective_scan, selective_scan_reference


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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


# The mixer, the block and the stack


@pytest.mark.parametrize("L", [1, 2, 12])
def test_the_shifted_convolution_is_conv1d_cut_to_the_past(L):
    mixer, x = Mamba(16), torch.randn(3, L, 32)
    expected = mixer.conv1d(x.transpose(1, 2))[:, :, :L].transpose(1, 2)
    torch.testing.assert_close(mixer.causal_conv(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("t", [0, 5, 16, 33])
def test_a_token_leaves_everything_before_it_bit_identical(t):
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


def test_the_fused_call_has_the_arguments_of_mamba_ssms_kernel(mamba_ssm, monkeypatch):
    _, kernels = mamba_ssm

    def causal_conv1d_fn(x, weight, bias, activation):
        assert activation == "silu"
        return F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=len(bias))[..., : x.shape[-1]])

    monkeypatch.setattr(kernels, "causal_conv1d_fn", causal_conv1d_fn)
    mixer, tokens = Mamba(64), torch.randn(2, 37, 64)
    torch.testing.assert_close(
        mixer.forward_fused(tokens, kernels.mamba_inner_ref), mixer(tokens), rtol=1e-5, atol=2e-7
    )


# The backend


def test_asking_for_cuda_without_it_says_what_to_install():
    with pytest.raises(BadInput, match=r"the device is cpu.*pip install mamba-ssm causal-conv1d --no-build-isolation"):
        choose_mamba_backend("cuda", torch.device("cpu"))


def test_asking_for_cuda_without_the_packages_names_the_missing_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    with pytest.raises(BadInput, match="causal_conv1d"):
        choose_mamba_backend("cuda", torch.device("cuda"))


@pytest.mark.parametrize(("name", "reason"), [("auto", "the device is cpu"), ("torch", "as set")])
def test_the_choice_is_printed_once_with_its_reason(name, reason, capsys):
    assert choose_mamba_backend(name, torch.device("cpu")) == "torch"
    Mamba(16)(torch.randn(1, 3, 16))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and "torch" in printed[0] and reason in printed[0]


def test_only_the_first_rank_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    choose_mamba_backend("auto", torch.device("cpu"))
    assert capsys.readouterr().out == ""
