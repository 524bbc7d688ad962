"""Mamba (Gu & Dao 2023, arXiv:2312.00752): the selective scan, the mixer, the residual block and a stack of blocks.

    B  batch              L  tokens (time)       D  token width
    E  inner width, expand * D                   N  SSM state per channel
    R  rank of the step-size projection, ceil(D / 16)

Inside the scan, A, B, C and D are the paper's matrices and delta is its step size. Parameter names, shapes and
initialisation are those of the mamba-ssm package, so a state dict moves between its kernels and this file, strict=True.

The scan exists three times with the same numbers: `selective_scan_reference` is the definition, `selective_scan` the
fast one in plain PyTorch, and mamba-ssm's kernels run on CUDA. `choose_mamba_backend` decides once, at start-up.
"""

import math
import os

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from errors import BadInput

CHUNK = 16  # tokens of which the scan holds all states at once
CACHED_ELEMENTS = 2**20  # states that a CPU scans at once: few enough to stay in its cache, enough to share among cores


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
        self.dt_proj.bias._no_reinit = True
        self.A_log._no_weight_decay = True
        self.D._no_weight_decay = True

    def forward(self, tokens: Tensor) -> Tensor:
        if _fused_kernel is not None and tokens.is_cuda:
            return self.forward_fused(tokens, _fused_kernel)
        N = self.A_log.shape[1]
        x, gate = self.in_proj(tokens).chunk(2, dim=-1)  # (B, L, E) each
        x = F.silu(self.causal_conv(x))
        dt, B, C = self.x_proj(x).split([self.dt_proj.in_features, N, N], dim=-1)  # (B, L, R or N)
        delta = F.softplus(self.dt_proj(dt).float())  # (B, L, E)
        y = selective_scan(x, delta, -torch.exp(self.A_log), B, C, self.D)
        return self.out_proj(y * F.silu(gate))

    def causal_conv(self, x: Tensor) -> Tensor:
        """conv1d without the outputs that look ahead: (B, L, E) -> (B, L, E).

        One shifted product per tap keeps E last; F.conv1d would need (B, E, L) and takes longer on a CPU.
        """
        taps = self.conv1d.weight.squeeze(1).T.contiguous()  # (d_conv, E), the last one meets the token itself
        y = torch.addcmul(self.conv1d.bias, x, taps[-1])
        for lag in range(1, len(taps)):
            y[:, lag:].addcmul_(x[:, :-lag], taps[-1 - lag])
        return y

    def forward_fused(self, tokens: Tensor, mamba_inner_fn) -> Tensor:
        """The same in one kernel, which wants time as the last axis."""
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
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))


class Block(nn.Module):
    """x + mixer(norm(x)), then, with an MLP, x + mlp(norm2(x)); RMSNorm as in mamba-ssm."""

    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int, with_mlp: bool):
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.mixer = Mamba(d_model, d_state, d_conv, expand)
        self.mlp = None
        if with_mlp:
            self.norm2 = nn.RMSNorm(d_model, eps=1e-5)
            self.mlp = GatedMLP(d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class MambaStack(nn.Module):
    """`depth` blocks without a norm after the last: (B, L, D) -> (B, L, D)."""

    def __init__(self, depth: int, d_model: int, d_state: int, d_conv: int, expand: int, with_mlp: bool):
        super().__init__()
        self.layers = nn.ModuleList(Block(d_model, d_state, d_conv, expand, with_mlp) for _ in range(depth))
        # Every branch adds to the residual stream: 1/sqrt(branches) keeps its variance at the start (GPT-2, mamba-ssm).
        into_residual = [layer.mixer.out_proj for layer in self.layers]
        into_residual += [layer.mlp.fc2 for layer in self.layers if with_mlp]
        with torch.no_grad():
            for linear in into_residual:
                nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
                linear.weight /= math.sqrt(len(into_residual))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


# The backend

_fused_kernel = None  # mamba-ssm's mamba_inner_fn where choose_mamba_backend settled on CUDA


def choose_mamba_backend(name: str, device: torch.device) -> str:
    """Called once at start-up with auto, cuda or torch: says which backend runs from then on and returns cuda or torch.

    auto takes mamba-ssm's kernels where they run and give this file's numbers; cuda raises BadInput where they do not.
    """
    global _fused_kernel
    _fused_kernel, reason = None, "as set"
    if name != "torch":
        try:
            _fused_kernel, reason = _working_kernel(device), "mamba-ssm's kernels run and agree with the plain scan"
        except (ImportError, OSError, RuntimeError) as failure:  # OSError: built for another torch
            first_line, *_ = str(failure).split("\n")
            reason = f"no mamba-ssm kernels: {first_line}"
    if name == "cuda" and _fused_kernel is None:
        raise BadInput(
            f"training.mamba_backend=cuda, but {reason}; pip install mamba-ssm causal-conv1d --no-build-isolation "
            "on a machine with a CUDA GPU, or --set training.mamba_backend=torch"
        )
    backend = "torch" if _fused_kernel is None else "cuda"
    if os.environ.get("RANK", "0") == "0":
        print(f"mamba backend: {backend} ({reason})")
    return backend


def _working_kernel(device: torch.device):
    """mamba_inner_fn after a trial against the plain scan: the packages may import where their kernels cannot run."""
    if device.type != "cuda":
        raise RuntimeError(f"the device is {device.type}")
    import causal_conv1d.cpp_functions  # noqa: F401  mamba-ssm goes on without it and then fails in the first forward
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

    with torch.random.fork_rng():  # the trial leaves the run's random numbers as they were
        mixer = Mamba(d_model=64).to(device)
        tokens = torch.randn(2, 12, 64, device=device)
    difference = mixer.forward_fused(tokens, mamba_inner_fn) - mixer(tokens)
    if not difference.abs().max() < 1e-2:  # far above TF32's rounding, far below a wrong result
        raise RuntimeError(f"they differ from the plain scan by {difference.abs().max():.1e}")
    return mamba_inner_fn
