"""Blocks of Mamba and patches of pictures whose matrix products are bfloat16, on a CPU that has them.

What it computes is defined by jepa/mamba.py's Block under torch.autocast, and by ImageTokenizer's convolution. Here the
same numbers take a fraction of autocast's time: activations are bfloat16 from one product to the next, so nothing is
converted in between. RMSNorm, convolution, scan and SwiGLU (scan_kernel.cpp) compute in float32 on what they read. The
residual stream, the scan's states, the weights and their gradients are float32. Without gradients a block is one call.

Letters as in jepa/mamba.py, and H hidden width of the MLP, P patches, p their side, M = B L rows of tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from jepa import cpu_kernel
from jepa.cpu_kernel import CHUNK, GROUP, NORM_ROWS, call

Made = TypeVar("Made")


def made_once(of: nn.Module, make: Callable[[], Made], packed: dict[nn.Module, Any] | None) -> Made:
    """What is made of a module's weights. `packed` keeps it, None where weights may change: a tensor's version does not
    tell, since fused AdamW leaves it as it is."""
    if packed is None:
        return make()
    if of not in packed:
        packed[of] = make()
    return packed[of]


def fits(x: Tensor, *widths: int) -> bool:
    """The kernels are for a float32 residual stream on the CPU and for widths in whole vectors."""
    return cpu_kernel.fits(x) and all(width % cpu_kernel.kernel().lanes() == 0 for width in widths)


def pack(weight: Tensor) -> Tensor:
    """A weight (N, K) of a matrix product, rounded and in the order in which scan_kernel.cpp reads it."""
    N, K = weight.shape
    tiles = torch.empty(-(-N // 16) * -(-K // 32) * 512, dtype=torch.bfloat16)
    call("pack_weight", weight.bfloat16().contiguous(), tiles, N, K)
    return tiles


# The block


def block_forward(block: Any, x: Tensor, last: int | None, packed: dict[nn.Module, Any] | None) -> Tensor:
    """jepa/mamba.py's Block: x (B, L, D) float32 -> (B, last or L, D) float32. `packed` as in `made_once`."""
    mixer, mlp = block.mixer, block.mlp
    others = [block.norm.weight, mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_proj.bias, mixer.A_log, mixer.D]
    products = [mixer.in_proj.weight, mixer.x_proj.weight, mixer.dt_proj.weight, mixer.out_proj.weight]
    if mlp is not None:
        others.append(block.norm2.weight)
        products += [mlp.fc1.weight, mlp.fc2.weight]
    last = x.shape[1] if last is None else last
    if torch.is_grad_enabled() and any(v.requires_grad for v in (x, *others, *products)):
        return BlockInBfloat16.apply(x, last, others, products, *others, *products)
    return infer(x, last, made_once(block, lambda: packed_block(others, products), packed))


def conv_taps(weight: Tensor) -> Tensor:
    """(E, 1, K) -> (K, E), the last one meets the token itself."""
    return weight.squeeze(1).T.contiguous()


class BlockInBfloat16(torch.autograd.Function):
    """x (B, L, D), the weights of `block_forward` -> (B, last, D), with gradients of x and of all weights."""

    @staticmethod
    def forward(ctx, x, last, others, products, *_):
        """`products` are the weights of matrix products, `others` the others; in `_` they stand once more, because only
        tensors that are arguments themselves get gradients."""
        norm, conv_weight, conv_bias, dt_bias, A_log, skip, *norm2 = (v.detach() for v in others)
        in_proj, x_proj, dt_proj, out_proj, *mlp = (v.detach().bfloat16() for v in products)
        x = x.contiguous()
        (B, L, D), (E, N), R = x.shape, A_log.shape, dt_proj.shape[1]
        _, normed, scale = add_norm(x.view(-1, D), None, norm)
        asked = normed.view(B, L, D)[:, -last:].contiguous().view(-1, D)
        if last == L:
            xz = normed @ in_proj.T  # (M, 2 E): x and gate
            gate, gate_stride = xz[:, E:], 2 * E
        else:
            xz = normed @ in_proj[:E].T  # (M, E)
            gate, gate_stride = asked @ in_proj[E:].T, E
        taps, A = conv_taps(conv_weight), -torch.exp(A_log.T.contiguous())  # (K, E), (N, E)
        u = xz.new_empty(B * L, E)
        call("conv_forward_bfloat16", xz, xz.shape[1], taps, conv_bias, u, B, L, E, len(taps))
        projected = u @ x_proj.T  # (M, R + 2 N)
        delta = projected[:, :R] @ dt_proj.T  # (M, E)
        BC = projected[:, R:].float()  # (M, 2 N)
        y, starts = xz.new_empty(B * last, E), x.new_empty(B, -(-L // CHUNK), N, E)
        sizes = (B, L, last, E, N)
        call(
            "scan_forward_bfloat16", u, delta, dt_bias, A, BC, BC[:, N:], 2 * N, skip, gate, gate_stride, y, starts,
            *sizes, 1,
        )  # fmt: skip
        x_last = x[:, -last:].contiguous().view(-1, D)
        saved = [x, norm, taps, conv_bias, dt_bias, A, skip, normed, scale, asked, xz, gate, u, projected, delta, BC]
        saved += [y, starts, in_proj, x_proj, dt_proj, out_proj]
        ctx.sizes, ctx.gate_stride, ctx.conv_shape, ctx.with_mlp = sizes, gate_stride, conv_weight.shape, bool(mlp)
        if mlp:
            fc1, fc2 = mlp
            x_last, normed2, scale2 = add_norm(x_last, y @ out_proj.T, *norm2)
            h = normed2 @ fc1.T  # (B last, 2 H)
            hidden = h.new_empty(len(h), h.shape[1] // 2)
            call("gated_silu_forward", h, hidden, *hidden.shape)
            saved += [x_last, *norm2, normed2, scale2, h, hidden, fc1, fc2]
            out = x_last + hidden @ fc2.T
        else:
            out = x_last + y @ out_proj.T
        ctx.save_for_backward(*saved)
        return out.view(B, last, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, norm, taps, conv_bias, dt_bias, A, skip, normed, scale, asked, xz, gate, u, projected, delta, BC, *rest = (
            ctx.saved_tensors
        )
        y, starts, in_proj, x_proj, dt_proj, out_proj, *of_mlp = rest
        (B, L, last, E, N), D, R = ctx.sizes, x.shape[2], dt_proj.shape[1]
        dx_last = dout.reshape(-1, D).contiguous()
        dbranch = dx_last.bfloat16()
        dmlp = []
        if ctx.with_mlp:
            x_last, norm2, normed2, scale2, h, hidden, fc1, fc2 = of_mlp
            dfc2 = dbranch.T @ hidden
            dh = torch.empty_like(h)
            call("gated_silu_backward", dbranch @ fc2, h, dh, *hidden.shape)
            dfc1 = dh.T @ normed2
            dx_last, dbranch, dnorm2 = add_norm_backward(dh @ fc1, x_last, scale2, norm2, dx_last)
            dmlp = [dfc1.float(), dfc2.float()]
        dout_proj = dbranch.T @ y
        dy = dbranch @ out_proj

        dxz, du, ddelta = torch.empty_like(xz), torch.empty_like(u), torch.empty_like(delta)
        dgate = dxz[:, E:] if last == L else torch.empty_like(gate)
        ddt_bias, dA, dskip = x.new_zeros(B, E), x.new_zeros(B, N, E), x.new_zeros(B, E)
        dB, dC = x.new_empty(2, -(-E // GROUP), B * L, N)
        call(
            "scan_backward_bfloat16", dy, u, delta, dt_bias, A, BC, BC[:, N:], 2 * N, skip, gate, ctx.gate_stride,
            starts, du, ddelta, ddt_bias, dA, dB, dC, dskip, dgate, *ctx.sizes,
        )  # fmt: skip
        ddt_proj = ddelta.T @ projected[:, :R]
        dprojected = torch.cat([ddelta @ dt_proj, dB.sum(0).bfloat16(), dC.sum(0).bfloat16()], dim=1)
        dx_proj = dprojected.T @ u
        du.addmm_(dprojected, x_proj)
        dtaps, dconv_bias = x.new_zeros(B, *taps.shape), x.new_zeros(B, E)
        call("conv_backward_bfloat16", du, xz, xz.shape[1], taps, conv_bias, dxz, dtaps, dconv_bias, B, L, E, len(taps))
        if last == L:
            din_proj = dxz.T @ normed
            dnormed = dxz @ in_proj
            dx = dx_last
        else:
            din_proj = torch.cat([dxz.T @ normed, dgate.T @ asked])
            dnormed = dxz @ in_proj[:E]
            dnormed.view(B, L, D)[:, -last:] += (dgate @ in_proj[E:]).view(B, last, D)
            dx = torch.zeros_like(x)
            dx[:, -last:] = dx_last.view(B, last, D)
        dx, _, dnorm = add_norm_backward(dnormed, x.view(-1, D), scale, norm, dx.view(-1, D))
        others = [
            dnorm, dtaps.sum(0).T.reshape(ctx.conv_shape), dconv_bias.sum(0), ddt_bias.sum(0), (dA.sum(0) * A).T,
            dskip.sum(0), *([dnorm2] if ctx.with_mlp else []),
        ]  # fmt: skip
        products = [din_proj.float(), dx_proj.float(), ddt_proj.float(), dout_proj.float(), *dmlp]
        return dx.view_as(x), None, None, None, *others, *products


def add_norm(x: Tensor, branch: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x + branch (M, D) in float32, its RMSNorm (M, D) in bfloat16, and the scales (M,) that the norm multiplied with.

    x is float32 and branch bfloat16.
    """
    total = x if branch is None else torch.empty_like(x)
    normed, scale = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(len(x))
    call("add_norm_forward", x, branch, weight, total, normed, scale, *x.shape)
    return total, normed, scale


def add_norm_backward(
    dnormed: Tensor, total: Tensor, scale: Tensor, weight: Tensor, dtotal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x (M, D), which is that of the branch, in float32 and in bfloat16, and the weight's (D,)."""
    dx, dx_rounded = torch.empty_like(total), torch.empty_like(dnormed)
    dweight = total.new_empty(-(-len(total) // NORM_ROWS), total.shape[1])
    call("add_norm_backward", dnormed, total, scale, weight, dtotal, dx, dx_rounded, dweight, *total.shape)
    return dx, dx_rounded, dweight.sum(0)


def packed_block(others: Sequence[Tensor], products: Sequence[Tensor]) -> dict:
    """The weights of a block as `infer` takes them."""
    norm, conv_weight, conv_bias, dt_bias, A_log, skip, *norm2 = (v.detach() for v in others)
    in_proj, x_proj, dt_proj, out_proj, *mlp = products
    to_x, to_gate = in_proj.chunk(2)
    E, N = A_log.shape
    taps = conv_taps(conv_weight)
    second_norm: list[Tensor | None] = [*norm2] or [None]
    of_mlp: list[Tensor | None] = [pack(weight) for weight in mlp] or [None, None]
    weights: list[Tensor | None] = [
        norm, pack(to_x), pack(to_gate), taps, conv_bias, pack(x_proj), pack(dt_proj), dt_bias,
        -torch.exp(A_log.T.contiguous()), skip, pack(out_proj),
        *second_norm, *of_mlp,
    ]  # fmt: skip
    return {"weights": weights, "sizes": (E, N, dt_proj.shape[1], len(taps), mlp[1].shape[1] if mlp else 0)}


def infer(x: Tensor, last: int, block: dict) -> Tensor:
    """x (B, L, D), a `packed_block` -> (B, last, D), without gradients, all of it in one call."""
    x = x.detach().contiguous()
    B, L, D = x.shape
    out = x.new_empty(B, last, D)
    call("block_inference", x, out, *block["weights"], B, L, last, D, *block["sizes"])
    return out


# Pictures


def patch_tokens(images: Tensor, patchify: nn.Conv2d, positions: Tensor, packed: dict[nn.Module, Any] | None) -> Tensor:
    """images (B, S, S, 3) uint8 -> (B, P, D): the convolution's weight times each patch in [-1, 1], and positions.
    `packed` as in `made_once`."""
    B, S, p, D = len(images), images.shape[1], patchify.kernel_size[0], patchify.out_channels
    bias = patchify.bias
    assert bias is not None
    if B and not images[0].is_contiguous():
        images = images.contiguous()
    inputs = 3 * p * p
    rows = torch.empty(B * (S // p) ** 2, inputs, dtype=torch.bfloat16)
    call("picture_patches", images, images.stride(0), rows, B, S, p)
    weights = [patchify.weight, bias, positions]
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        products = rows @ by_pixel(patchify.weight).bfloat16().T
        return products.view(B, -1, D) + (positions + bias)

    def packed_patchify() -> tuple[Tensor, Tensor]:
        return pack(by_pixel(patchify.weight)), positions + bias

    weight, offsets = made_once(patchify, packed_patchify, packed)
    out = offsets.repeat(B, 1)
    call("packed_product_float32", rows, inputs, weight, out, D, len(rows), D, inputs, 1)
    return out.view(B, -1, D)


def by_pixel(weight: Tensor) -> Tensor:
    """A convolution's weight (D, 3, p, p) in the order of a picture's bytes, (D, p p 3)."""
    return weight.permute(0, 2, 3, 1).flatten(1)
