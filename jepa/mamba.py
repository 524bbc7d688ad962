"""Mamba (Gu & Dao 2023, arXiv:2312.00752): the selective scan, the mixer, the residual block and a stack of blocks.

    B  batch              L  tokens (time)       D  token width
    E  inner width, expand * D                   N  SSM state per channel
    R  rank of the step-size projection, ceil(D / 16)

Inside the scan, A, B, C and D are the paper's matrices and delta is its step size. Parameter names, shapes and
initialisation are those of the mamba-ssm package, so a state dict moves between its kernels and this file, strict=True.

The scan exists four times with the same numbers: `selective_scan_reference` is the definition, `selective_scan` the
fast one in plain PyTorch, cpu_kernel.py has one in C++ and mamba-ssm one for CUDA. `choose_mamba_backend` decides once,
at start-up. Who never calls it gets plain PyTorch: a forward pass should not start a compiler or write to a home.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from errors import BadInput
from jepa import bf16, cpu_kernel

CHUNK = 16  # tokens of which the scan holds all states at once
CACHED_ELEMENTS = 2**20  # states that a CPU scans at once: few enough to stay in its cache, enough to share among cores


@dataclass
class Backend:
    """Which kernels run from now on. `choose_mamba_backend` decides, `using_backend` changes it for a while."""

    name: str = "torch"  # or cpp, cuda
    mamba_ssm: Any = None  # the functions of mamba-ssm and causal-conv1d, once backend cuda has loaded them
    bfloat16: bool = False  # on backend cpp: whether blocks and patches run jepa/bf16.py (jepa/precision.py sets it)
    packed: dict[nn.Module, Any] | None = None  # what jepa/bf16.py has made of weights that stay as they are


backend = Backend()


@contextmanager
def using_backend(name: str) -> Iterator[None]:
    """Runs everything in the block on this backend. Its kernels must have been loaded before."""
    before, backend.name = backend.name, name
    try:
        yield
    finally:
        backend.name = before


def _on_cuda_kernels(x: Tensor) -> bool:
    return backend.name == "cuda" and x.is_cuda


def selective_scan_reference(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The recurrence of Algorithm 2, one token at a time: the definition.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,  h = 0 before the first token
    y_t = C_t h_t + D u_t

    u and delta (B, L, E), delta > 0 (softplus is the caller's); A (E, N), negative; B and C (B, L, N); D (E,)
    -> y (B, L, E). As in the authors' code, B is discretised by Euler's rule and only A exactly.
    """
    h = u.new_zeros(len(u), *A.shape)  # (B, E, N)
    y = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)  # (B, E, N)
        h = decay * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]  # (B, E, N)
        y.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])  # (B, E)
    return torch.stack(y, dim=1)


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`selective_scan_reference` in a fraction of its time and memory; float32 also under autocast, float64 stays."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C, D = (v.to(dtype) for v in (u, delta, A, B, C, D))
    if u.device.type != "cpu":
        return ChunkedScan.apply(u, delta, A, B, C, D)
    samples = max(1, CACHED_ELEMENTS // (CHUNK * A.numel()))
    pieces = zip(*(v.split(samples) for v in (u, delta, B, C)), strict=True)
    return torch.cat([ChunkedScan.apply(u, delta, A, B, C, D) for u, delta, B, C in pieces])


class ChunkedScan(torch.autograd.Function):
    """Scans CHUNK tokens at a time, in buffers that every chunk uses again.

    All states of a sequence would take N times the memory of its activations, so only those between chunks are kept;
    backward computes a chunk's states again and then runs the recurrence of their gradient from the chunk's end:

    g_t = dL/dh_t = C_t dy_t + a_{t+1} g_{t+1},  with the decay a_t = exp(delta_t A)

    Time is the first axis, so that the states of one token are contiguous, and E the last, so that B_t and C_t, which
    all channels share, scale whole rows. Products with a vector are written row @ matrix: CPU kernels are several times
    slower at a batch of matrix @ column.
    """

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D):
        with torch.autocast(u.device.type, enabled=False):
            x, dt, b, c = (time_first(v) for v in (delta * u, delta, B, C))  # (L, B, E) and (L, B, N)
            A_ne = A.T.contiguous()  # (N, E)
            decay, states = chunk_buffers(x, A_ne)
            states[0] = 0
            y, starts = [], []
            for now in chunks(x):
                starts.append(states[0].clone())
                h = fill_chunk(decay, states, x[now], dt[now], A_ne, b[now])
                y.append((c[now, :, None] @ h).squeeze(2))
                states[0] = h[-1]
            ctx.save_for_backward(u, delta, A, B, C, D, torch.stack(starts))
            return torch.cat(y).transpose(0, 1).addcmul(u, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, delta, A, B, C, D, starts = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            x, dt, b, c, dy_ = (time_first(v) for v in (delta * u, delta, B, C, dy))  # (L, B, E) and (L, B, N)
            dx, ddt, db, dc = (torch.empty_like(v) for v in (x, dt, b, c))
            A_ne = A.T.contiguous()  # (N, E)
            dA = torch.zeros_like(A_ne)
            decay, states = chunk_buffers(x, A_ne)
            gradients = torch.empty_like(decay)
            carried = torch.zeros_like(states[0])  # a_{t+1} g_{t+1} from the chunk that follows in time
            for start, now in reversed(list(zip(starts, chunks(x), strict=True))):
                states[0] = start
                h = fill_chunk(decay, states, x[now], dt[now], A_ne, b[now])
                dc[now] = (dy_[now, :, None] @ h.mT).squeeze(2)

                a, g = decay[: len(h)], gradients[: len(h)]
                torch.mul(c[now, :, :, None], dy_[now, :, None], out=g)
                g[-1] += carried
                a_t, g_t = a.unbind(), g.unbind()
                for t in range(len(g) - 1, 0, -1):
                    g_t[t - 1].addcmul_(a_t[t], g_t[t])
                dx[now] = (b[now, :, None] @ g).squeeze(2)
                db[now] = (x[now, :, None] @ g.mT).squeeze(2)

                a.mul_(g)
                carried = a[0].clone()
                a.mul_(states[: len(h)])  # a_t h_{t-1} g_t, the gradient of delta_t A
                dA += torch.mul(a, dt[now, :, None], out=g).sum((0, 1))
                torch.sum(a.mul_(A_ne), 2, out=ddt[now])
            dx, ddt, db, dc = (v.transpose(0, 1) for v in (dx, ddt, db, dc))
            return (dx * delta).addcmul_(dy, D), ddt.addcmul_(dx, u), dA.T, db, dc, (dy * u).sum((0, 1))


def time_first(v: Tensor) -> Tensor:
    return v.transpose(0, 1).contiguous()


def chunks(x: Tensor) -> list[slice]:
    return [slice(first, min(first + CHUNK, len(x))) for first in range(0, len(x), CHUNK)]


def chunk_buffers(x: Tensor, A_ne: Tensor) -> tuple[Tensor, Tensor]:
    """Room for a chunk's decays (T, B, N, E), and for its states with the one before them (1 + T, B, N, E)."""
    T, batch = min(CHUNK, len(x)), x.shape[1]
    return x.new_empty(T, batch, *A_ne.shape), x.new_empty(1 + T, batch, *A_ne.shape)


def fill_chunk(decay: Tensor, states: Tensor, x: Tensor, dt: Tensor, A_ne: Tensor, b: Tensor) -> Tensor:
    """Runs the recurrence from states[0] over x = delta u (T, B, E), dt (T, B, E), b (T, B, N) -> h (T, B, N, E)."""
    a, h = decay[: len(x)], states[1 : 1 + len(x)]
    # exp(v) = 2^(v / ln 2): exp can slow down a hundredfold where its result is subnormal, exp2 does not.
    torch.mul(dt[:, :, None], A_ne / math.log(2), out=a).exp2_()
    torch.mul(x[:, :, None], b[..., None], out=h)
    for a_t, h_t, h_before in zip(a.unbind(), h.unbind(), states.unbind(), strict=False):
        h_t.addcmul_(a_t, h_before)
    return h


# The mixer's two operations beside its projections, each on the backend that was chosen


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of the depthwise convolution that looks back only. x (B, L, E), weight (E, 1, K), bias (E,) -> (B, L, E)."""
    if _on_cuda_kernels(x):
        return backend.mamba_ssm.causal_conv1d_fn(x.mT, weight.squeeze(1), bias, activation="silu").mT
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    taps = weight.squeeze(1).T.contiguous()  # (K, E), the last one meets the token itself
    if backend.name == "cpp" and cpu_kernel.fits(x):
        return cpu_kernel.ConvSiLU.apply(x, taps, bias)
    # One shifted product per tap keeps E last; F.conv1d would need (B, E, L) and takes longer on a CPU.
    y = torch.addcmul(bias, x, taps[-1])
    for lag in range(1, len(taps)):
        y[:, lag:].addcmul_(x[:, :-lag], taps[-1 - lag])
    return F.silu(y)


def gated_scan(
    u: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor
) -> Tensor:
    """`selective_scan` with delta = softplus(dt + dt_bias), times SiLU(gate), at the tokens that have a gate: the last.

    u and dt (B, L, E), gate (B, l, E) -> (B, l, E); computed in float32 also under autocast.
    """
    last = gate.shape[1]
    if _on_cuda_kernels(u):
        # It wants time as the last axis, u, dt, B and C in one type, bfloat16 under autocast, and the rest in float32.
        u, dt, B, C = (v.mT.to(u.dtype) for v in (u, dt, B, C))
        y = backend.mamba_ssm.selective_scan_fn(u, dt, A, B, C, D, delta_bias=dt_bias, delta_softplus=True).mT
        return y[:, -last:] * F.silu(gate)
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, dt, dt_bias, A, B, C, D, gate = inputs = [v.to(dtype) for v in (u, dt, dt_bias, A, B, C, D, gate)]
    if backend.name == "cpp" and cpu_kernel.fits(u):
        return cpu_kernel.gated_scan(*inputs)
    y = selective_scan(u, F.softplus(dt + dt_bias), A, B, C, D)
    return y[:, -last:] * F.silu(gate)


def last_tokens(tokens: Tensor, last: int | None) -> Tensor:
    return tokens if last is None else tokens[:, -last:]


# The mixer, the block and the stack


class Mamba(nn.Module):
    """The Mamba mixer (paper, Figure 3): (B, L, D) -> (B, L, D), causal; parameters as in mamba_ssm's Mamba."""

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2):
        super().__init__()
        d_inner, dt_rank = expand * d_model, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))  # S4D-real: A_n = -n
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

        # At the start the step sizes, softplus(bias), are spread log-uniformly over [0.001, 0.1].
        dt = torch.exp(torch.empty(d_inner).uniform_(math.log(0.001), math.log(0.1)))
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(dt_rank**-0.5), dt_rank**-0.5)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        # mamba-ssm's own marks, which optimizers look for.
        marks = {"_no_reinit": [self.dt_proj.bias], "_no_weight_decay": [self.A_log, self.D]}
        for mark, parameters in marks.items():
            for parameter in parameters:
                setattr(parameter, mark, True)

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """With `last`, only the outputs of the last tokens: (B, last, D)."""
        if _on_cuda_kernels(tokens) and last is None:
            return self.forward_fused(tokens, backend.mamba_ssm.mamba_inner_fn)
        to_x, to_gate = self.in_proj.weight.chunk(2)
        N = self.A_log.shape[1]
        conv_bias = self.conv1d.bias
        assert conv_bias is not None
        x = causal_conv_silu(F.linear(tokens, to_x), self.conv1d.weight, conv_bias)  # (B, L, E)
        dt, B, C = self.x_proj(x).split([self.dt_proj.in_features, N, N], dim=-1)  # (B, L, R or N)
        dt = F.linear(dt, self.dt_proj.weight)  # (B, L, E)
        gate = F.linear(last_tokens(tokens, last), to_gate)
        return self.out_proj(gated_scan(x, dt, self.dt_proj.bias, -torch.exp(self.A_log), B, C, self.D, gate))

    def forward_fused(self, tokens: Tensor, mamba_inner_fn) -> Tensor:
        """The same in one kernel, which wants time as the last axis.

        Under autocast it projects and convolves in bfloat16; A, D and dt's bias have to be float32, as its state is.
        """
        xz = self.in_proj.weight @ rearrange(tokens, "b l d -> d (b l)")
        return mamba_inner_fn(
            rearrange(xz, "e (b l) -> b e l", b=len(tokens)),
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            None,  # out_proj has no bias
            -torch.exp(self.A_log),
            D=self.D,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
        )


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020) with mamba-ssm's hidden width, 8/3 D rounded up to a multiple of 128."""

    def __init__(self, d_model: int):
        super().__init__()
        hidden = math.ceil(8 * d_model // 3 / 128) * 128
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        to_y, to_gate = self.fc1.weight.chunk(2)
        return self.fc2(F.linear(x, to_y) * F.silu(F.linear(x, to_gate)))


class Block(nn.Module):
    """x + mixer(norm(x)), then, with an MLP, x + mlp(norm2(x)); RMSNorm as in mamba-ssm."""

    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int, with_mlp: bool):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.mixer = Mamba(d_model, d_state, d_conv, expand)
        self.mlp: GatedMLP | None = None
        if with_mlp:
            self.norm2 = nn.RMSNorm(d_model, eps=1e-5)
            self.mlp = GatedMLP(d_model)

    def forward(self, x: Tensor, last: int | None = None, bfloat16: bool = False) -> Tensor:
        if bfloat16 and bf16.fits(x, self.mixer.in_proj.out_features // 2):
            return bf16.block_forward(self, x, last, backend.packed)
        x = last_tokens(x, last) + self.mixer(self.norm(x), last)
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class MambaStack(nn.Module):
    """`depth` blocks without a norm after the last: (B, L, D) -> (B, L, D).

    With `checkpoint_activations`, training keeps only the input of every block and runs the block again in backward.
    """

    checkpoint_activations = False

    def __init__(self, depth: int, d_model: int, d_state: int, d_conv: int, expand: int, with_mlp: bool):
        super().__init__()
        blocks = [Block(d_model, d_state, d_conv, expand, with_mlp) for _ in range(depth)]
        self.layers = nn.ModuleList(blocks)
        # Every branch adds to the residual stream: 1/sqrt(branches) keeps its variance at the start (GPT-2, mamba-ssm).
        into_residual = [block.mixer.out_proj for block in blocks]
        into_residual += [block.mlp.fc2 for block in blocks if block.mlp is not None]
        with torch.no_grad():
            for linear in into_residual:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
                linear.weight /= math.sqrt(len(into_residual))

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """With `last`, (B, last, D): the last block spares itself what only other tokens' outputs would need."""
        recompute = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            wanted = last if layer is self.layers[-1] else None
            if recompute:  # in backward, where `backend` may say something else; nothing is random
                x = checkpoint(layer, x, wanted, backend.bfloat16, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, wanted, backend.bfloat16)
        return x


# The backend

KERNELS = {"cuda": "mamba-ssm kernels", "cpp": "C++ kernel"}
INSTALL_MAMBA_SSM = "pip install mamba-ssm causal-conv1d --no-build-isolation on a machine with a CUDA GPU"
REMEDIES = {  # by the words of the failure
    "cuda": {
        "the device is": INSTALL_MAMBA_SSM,
        "No module named": INSTALL_MAMBA_SSM,
        "undefined symbol": "build the package anew for this PyTorch, pip install --force-reinstall --no-deps",
    },
    "cpp": {"the device is": "it runs where the device is cpu", "no C++ compiler": "install g++ or clang++"},
}


def choose_mamba_backend(name: str, device: torch.device) -> str:
    """Called once at start-up with auto, cuda, cpp or torch: says which backend runs from then on and returns its name.

    auto takes the device's kernels, mamba-ssm's on CUDA and the C++ one on a CPU, where they run and give this file's
    numbers, and plain PyTorch where they do not; cuda and cpp raise BadInput there.
    """
    wanted, reason = name, "as set"
    if name == "auto":
        wanted = "cpp" if device.type == "cpu" else "cuda"
    if wanted != "torch":
        try:
            _try_kernels(wanted, device)
            reason = "its kernels run and agree with plain PyTorch"
        except (ImportError, OSError, RuntimeError) as failure:  # OSError: no compiler, or built for another torch
            first_line, *_ = str(failure).split("\n")
            reason = f"no {KERNELS[wanted]}: {first_line}"
            if wanted == name:
                remedies = [remedy for words, remedy in REMEDIES[name].items() if words in reason]
                remedy = ", or ".join([*remedies, "--set training.mamba_backend=torch"])
                raise BadInput(f"training.mamba_backend={name}, but {reason}; {remedy}") from None
            wanted = "torch"
    backend.name = wanted
    if os.environ.get("RANK", "0") == "0":
        print(f"mamba backend: {wanted} ({reason})")
    return wanted


@torch.enable_grad()
def _try_kernels(name: str, device: torch.device) -> None:
    """Loads kernels and holds them against plain PyTorch: they may import or compile where they cannot run."""
    if device.type != {"cuda": "cuda", "cpp": "cpu"}[name]:
        raise RuntimeError(f"the device is {device.type}")
    if name == "cpp":
        cpu_kernel.kernel()
    else:
        import causal_conv1d.cpp_functions  # noqa: F401  mamba-ssm goes on without it and then fails in the first forward
        from mamba_ssm.ops import selective_scan_interface

        backend.mamba_ssm = selective_scan_interface

    with torch.random.fork_rng():  # the trial leaves the run's random numbers as they were
        stack = MambaStack(2, 64, d_state=16, d_conv=4, expand=2, with_mlp=False).to(device)
        tokens = torch.randn(2, 21, 64, device=device)
    # TF32 and bfloat16 round, and differently in every kernel; a wrong result is far beyond that.
    for bfloat16, tolerance in {"cpp": [(False, 1e-4)], "cuda": [(False, 1e-2), (True, 0.1)]}[name]:
        results = []
        for one in ("torch", name):
            with using_backend(one):
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    y = stack(tokens, last=3)  # the last block runs on separate kernels, the other on the fused one
                gradients = torch.autograd.grad(y.float().square().sum(), list(stack.parameters()))
            results.append([y.detach(), *gradients])
        differences = [(f - e).abs().max() / e.abs().max() for e, f in zip(*results, strict=True)]
        difference = torch.stack(differences).max()  # NaN where one is
        if not difference < tolerance:
            raise RuntimeError(f"they differ from plain PyTorch by {difference:.1e} of the largest value")
