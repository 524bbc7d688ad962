"""scan_kernel.cpp for the CPU: compiled on first use, kept in a cache folder, called through ctypes.

The folder is $XDG_CACHE_HOME/statevla or ~/.cache/statevla; where it cannot be written, a temporary one is used and the
kernel compiled at every start. Letters as in jepa/mamba.py, which has the definitions and decides when this is used.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_name("scan_kernel.cpp")
CHUNK = 16  # tokens between the states that training keeps
GROUP = 64  # channels a thread takes at a time
# Without -ffast-math: it would fold the rounding trick in exp away and lose NaN.
FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", f"-DCHUNK={CHUNK}", f"-DGROUP={GROUP}"]


# Building


@functools.cache
def kernel() -> ctypes.CDLL:
    """The kernel of this machine; the first call may compile it, which takes seconds. Raises OSError where it can't."""
    compiler = find_compiler()
    # The predefined macros name the compiler's version and every instruction set that -march=native stands for here, so
    # that machines of different kinds never load each other's kernel from a shared home.
    macros = run([*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256("\n".join([*compiler, *FLAGS, macros, SOURCE.read_text()]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statevla"
    library = cache / f"scan_kernel_{key}.so"
    if not library.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=cache)
        except OSError:
            folder = tempfile.TemporaryDirectory()
        with folder as name:
            built = Path(name) / library.name
            run([*compiler, *FLAGS, "-shared", "-fPIC", "-o", str(built), str(SOURCE)])
            if built.parent.parent != cache:
                return ctypes.CDLL(str(built))  # stays loaded when the folder goes
            os.replace(built, library)  # another process may have been faster: then its file is replaced by its equal
    return ctypes.CDLL(str(library))


def find_compiler() -> list[str]:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for command in map(shlex.split, candidates):
        if shutil.which(command[0]):
            return command
    raise OSError(f"no C++ compiler ({', '.join(candidates)})")


def run(command: list[str]) -> str:
    """-> what it prints, or OSError with the first line of its complaint."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        complaint = [line for line in result.stderr.splitlines() if "error" in line] or [f"exit {result.returncode}"]
        raise OSError(f"{shlex.join(command[:1])} fails: {complaint[0]}")
    return result.stdout


# Calling


def fits(x: Tensor) -> bool:
    """The kernel is for float32 on the CPU and for channels, the last axis, in whole vectors."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[-1] % kernel().lanes() == 0


def call(function: str, *arguments: Tensor | int) -> None:
    """Tensors go as pointers, which is why they have to be contiguous, sizes as int64; the threads are PyTorch's."""
    pointers = (ctypes.c_void_p(v.data_ptr()) if isinstance(v, Tensor) else ctypes.c_int64(v) for v in arguments)
    getattr(kernel(), function)(*pointers, ctypes.c_int64(torch.get_num_threads()))


def contiguous(*tensors: Tensor) -> list[Tensor]:
    return [v.contiguous() for v in tensors]


def gated_scan(*inputs: Tensor) -> Tensor:
    """GatedScan; states are kept where a backward may follow."""
    return GatedScan.apply(*inputs, torch.is_grad_enabled() and any(v.requires_grad for v in inputs))


class ConvSiLU(torch.autograd.Function):
    """x (B, L, E), taps (K, E), bias (E,) -> (B, L, E)."""

    @staticmethod
    def forward(ctx, x, taps, bias):
        x, taps, bias = contiguous(x, taps, bias)
        ctx.save_for_backward(x, taps, bias)
        y = torch.empty_like(x)
        call("conv_forward", x, taps, bias, y, *x.shape, len(taps))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, taps, bias = ctx.saved_tensors
        dx, dtaps, dbias = torch.zeros_like(x), x.new_zeros(len(x), *taps.shape), x.new_zeros(len(x), *bias.shape)
        call("conv_backward", dy.contiguous(), x, taps, bias, dx, dtaps, dbias, *x.shape, len(taps))
        return dx, dtaps.sum(0), dbias.sum(0)


class GatedScan(torch.autograd.Function):
    """u, dt (B, L, E), bias (E,), A (E, N), B and C (B, L, N), D (E,), gate (B, L_out, E) -> (B, L_out, E).

    With `keep`, the states between chunks, a CHUNK-th of all, stay for backward, which computes the others again.
    """

    @staticmethod
    def forward(ctx, u, dt, bias, A, B, C, D, gate, keep):
        inputs = contiguous(u, dt, bias, A.T, B, C, D, gate)
        (samples, L, E), N = u.shape, A.shape[1]
        starts = u.new_empty(samples, -(-L // CHUNK) if keep else 1, N, E)
        out = torch.empty_like(inputs[-1])
        call("scan_forward", *inputs, out, starts, samples, L, gate.shape[1], E, N, int(keep))
        ctx.save_for_backward(*inputs, starts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *inputs, starts = ctx.saved_tensors
        u, dt, bias, A_ne, B, C, D, gate = inputs
        (samples, L, E), N = u.shape, len(A_ne)
        du, ddt, dgate = torch.empty_like(u), torch.empty_like(dt), torch.empty_like(gate)
        dbias, dA, dD = (v.new_zeros(samples, *v.shape) for v in (bias, A_ne, D))
        dB, dC = (v.new_empty(-(-E // GROUP), *v.shape) for v in (B, C))
        gradients = (du, ddt, dbias, dA, dB, dC, dD, dgate)
        call("scan_backward", dout.contiguous(), *inputs, starts, *gradients, samples, L, gate.shape[1], E, N)
        return du, ddt, dbias.sum(0), dA.sum(0).T, dB.sum(0), dC.sum(0), dD.sum(0), dgate, None
