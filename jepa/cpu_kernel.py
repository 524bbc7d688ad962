"""scan_kernel.cpp for the CPU: compiled on first use, kept in a cache folder, called through ctypes.

The folder is $XDG_CACHE_HOME/statevla or ~/.cache/statevla; where it cannot be used, the kernel is compiled at every
start. Letters as in jepa/mamba.py, which has the definitions and decides when this is used.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from files import cache_folder, written_whole

SOURCE = Path(__file__).with_name("scan_kernel.cpp")
CHUNK = 16  # tokens between the states that training keeps
GROUP = 64  # channels a thread takes at a time
NORM_ROWS = 64  # rows of tokens that share a part of the gradient of a norm's weight
# Without -ffast-math: it would fold the rounding trick in exp away and lose NaN.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    f"-DCHUNK={CHUNK}",
    f"-DGROUP={GROUP}",
    f"-DNORM_ROWS={NORM_ROWS}",
]
LONGEST_COMPILATION = 300  # seconds; it takes one or two


# Building


@functools.cache
def kernel() -> ctypes.CDLL:
    """The kernel of this machine; the first call may compile it, which takes seconds. Raises OSError where it can't."""
    compiler = find_compiler()
    # The predefined macros name the compiler's version and every instruction set that -march=native stands for here, so
    # that machines of different kinds never load each other's kernel from a shared home.
    macros = run([*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    parts = [*compiler, *FLAGS, macros, SOURCE.read_text(encoding="utf-8")]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return cached_kernel(key) or built_kernel(compiler, key)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def cached_kernel(key: str) -> ctypes.CDLL | None:
    """The kernel that an earlier start kept, if it is whole and can be loaded.

    Its name holds the digest of its content. Loading a file that was cut short ends the process with SIGBUS, so it is
    compared before, and deleted where it differs.
    """
    folder = cache_folder()
    for library in sorted(folder.glob(f"scan_kernel_{key}_*.so")) if folder else []:
        try:
            if library.stem.endswith(digest(library.read_bytes())):
                return ctypes.CDLL(str(library))
            library.unlink()
        except OSError:  # not readable, not executable there, or made for another C library: it is compiled anew
            continue
    return None


def built_kernel(compiler: list[str], key: str) -> ctypes.CDLL:
    """Compiles the kernel, loads it and keeps it for the next start where there is a place for it."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "scan_kernel.so"
        run([*compiler, *FLAGS, "-shared", "-fPIC", "-o", str(built), str(SOURCE)])
        content = built.read_bytes()
        try:
            library = ctypes.CDLL(str(built))  # stays loaded when the folder goes
        except OSError as problem:
            if "failed to map" not in str(problem):
                raise
            kept = keep(content, key)  # nothing may be executed from the temporary folder, perhaps from this one
            if kept is None:
                raise
            return ctypes.CDLL(str(kept))
        keep(content, key)
        return library


def keep(content: bytes, key: str) -> Path | None:
    """The file in the cache folder, None where it cannot be written. Two processes that write it at once write the
    same."""
    folder = cache_folder()
    if folder is None:
        return None
    library = folder / f"scan_kernel_{key}_{digest(content)}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(library) as stream:
            stream.write(content)
    except OSError:
        return None
    return library


def find_compiler() -> list[str]:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    for candidate in candidates:
        try:
            command = shlex.split(candidate)
        except ValueError as problem:
            raise OSError(f"CXX={candidate} is not a command ({problem})") from None
        if shutil.which(command[0]):
            return command
    raise OSError(f"no C++ compiler ({', '.join(candidates)})")


def run(command: list[str]) -> str:
    """-> what it prints, or OSError with the first line of its complaint, in English."""
    name = shlex.join(command[:1])
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env=os.environ | {"LC_ALL": "C"}, start_new_session=True,
    )  # fmt: skip
    try:
        printed, complaints = process.communicate(timeout=LONGEST_COMPILATION)
    except BaseException as problem:
        os.killpg(process.pid, signal.SIGKILL)  # a compiler is several processes
        process.communicate()
        if not isinstance(problem, subprocess.TimeoutExpired):
            raise
        raise OSError(f"{name} does not end within {LONGEST_COMPILATION} seconds") from None
    if process.returncode < 0:
        raise OSError(f"{name} was ended by {signal.Signals(-process.returncode).name}")
    if process.returncode > 0:
        complaint = [line for line in complaints.splitlines() if "error" in line] or [f"exit {process.returncode}"]
        raise OSError(f"{name} fails: {complaint[0]}")
    return printed


# Calling


def fits(x: Tensor) -> bool:
    """The kernel is for float32 on the CPU and for channels, the last axis, in whole vectors."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[-1] % kernel().lanes() == 0


def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself (AMX or AVX512-BF16)."""
    return kernel().bfloat16_products() > 0


@functools.cache
def function(library: ctypes.CDLL, name: str) -> Callable[..., None]:
    address = ctypes.c_void_p.in_dll(library, name).value
    assert address is not None
    return ctypes.CFUNCTYPE(None)(address)


def call(name: str, *arguments: Tensor | int | None) -> None:
    """Tensors go as pointers, which is why their rows have to be contiguous, None as a null pointer and sizes as int64;
    the threads are PyTorch's."""
    pointers = [ctypes.c_int64(v) if isinstance(v, int) else pointer(v) for v in arguments]
    function(kernel(), name)(*pointers, ctypes.c_int64(torch.get_num_threads()))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


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
        call("conv_forward_float32", x, x.shape[2], taps, bias, y, *x.shape, len(taps))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, taps, bias = ctx.saved_tensors
        dx, dtaps, dbias = torch.empty_like(x), x.new_zeros(len(x), *taps.shape), x.new_zeros(len(x), *bias.shape)
        gradients = (dx, dtaps, dbias)
        call("conv_backward_float32", dy.contiguous(), x, x.shape[2], taps, bias, *gradients, *x.shape, len(taps))
        return dx, dtaps.sum(0), dbias.sum(0)


class GatedScan(torch.autograd.Function):
    """u, dt (B, L, E), bias (E,), A (E, N), B and C (B, L, N), D (E,), gate (B, L_out, E) -> (B, L_out, E).

    With `keep`, the states between chunks, a CHUNK-th of all, stay for backward, which computes the others again.
    """

    @staticmethod
    def forward(ctx, u, dt, bias, A, B, C, D, gate, keep):
        u, dt, bias, A_ne, B, C, D, gate = inputs = contiguous(u, dt, bias, A.T, B, C, D, gate)
        (samples, L, E), N = u.shape, A.shape[1]
        starts = u.new_empty(samples, -(-L // CHUNK) if keep else 1, N, E)
        out = torch.empty_like(gate)
        sizes = (samples, L, gate.shape[1], E, N)
        call("scan_forward_float32", u, dt, bias, A_ne, B, C, N, D, gate, E, out, starts, *sizes, int(keep))
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
        gradients, sizes = (du, ddt, dbias, dA, dB, dC, dD, dgate), (samples, L, gate.shape[1], E, N)
        inputs = (u, dt, bias, A_ne, B, C, N, D, gate, E)
        call("scan_backward_float32", dout.contiguous(), *inputs, starts, *gradients, *sizes)
        return du, ddt, dbias.sum(0), dA.sum(0).T, dB.sum(0), dC.sum(0), dD.sum(0), dgate, None
