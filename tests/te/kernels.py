"""Transformer Engine's compiled functions in plain torch, for tests/te in place of `transformer_engine_torch`.

Names, argument orders and results are those of Transformer Engine 2.9's Python sources, which call them. Replaced
functions:

- fp32, bf16, unfused attention: generic_gemm, rmsnorm_fwd and _bwd, layernorm_fwd and _bwd, get_cudnn_version
- bf16 and packed attention (attention.py): get_fused_attn_backend, fused_attn_fwd, fused_attn_bwd
- rotary embeddings: fused_rope_forward, fused_rope_backward
- FP8 with delayed and with current scaling: quantize, dequantize, bgrad_quantize, fp8_transpose; for weights kept in
  FP8 compute_amax, multi_tensor_compute_scale_and_scale_inv
- mcore's optimizer: multi_tensor_scale, multi_tensor_l2norm, multi_tensor_adam

extension.py makes a module of them, with all other names too.
"""

from __future__ import annotations

import math

import torch

from tests.te.attention import fused_attn_bwd, fused_attn_fwd, get_cudnn_version, get_fused_attn_backend
from tests.te.extension import DType

_TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


def _dtype(d):
    return _TORCH[d] if isinstance(d, DType) else d


def _mat(x, rowwise):
    """2-D matrix behind a GEMM operand; for fp8 the copy (data / transpose) Hopper would read."""
    if not hasattr(x, "_fp8_dtype"):
        return x.reshape(-1, x.shape[-1])
    raw = x._data if rowwise else x._transpose
    if raw is None or (not rowwise and x._transpose_invalid):
        raise RuntimeError(f"fp8 GEMM needs {'row' if rowwise else 'column'}-wise data")
    y = raw.view(_dtype(x._fp8_dtype)).float() * x._scale_inv
    return y.reshape(-1, y.shape[-1]) if rowwise else y.reshape(y.shape[0], -1).t()


def generic_gemm(
    A,
    transA,
    B,
    transB,
    D,
    quantizer,
    output_dtype,
    bias,
    bias_type,
    gelu,
    gelu_in,
    grad,
    workspace,
    workspace_size,
    accumulate,
    use_split_accumulator,
    comm_overlap=None,
    comm_type=None,
    extra_output=None,
    bulk_overlap=False,
    alpha=1.0,
    beta=None,
):
    """D = op(B) @ op(A) (column-major cuBLAS seen from row-major torch); bias, or its gradient if grad."""
    if gelu or comm_overlap is not None:
        raise NotImplementedError("tests.te.kernels: generic_gemm: gelu epilogue / userbuffers")
    a, b = _mat(A, transA), _mat(B, not transB)
    dtype = D.dtype if D is not None else _dtype(output_dtype) or A.dtype
    if hasattr(A, "_fp8_dtype") != hasattr(B, "_fp8_dtype"):
        raise RuntimeError("cuBLAS multiplies FP8 matrices with FP8 matrices alone")
    if hasattr(A, "_fp8_dtype") and any(size % 16 for size in (*a.shape, *b.shape)):
        raise RuntimeError(f"cuBLAS multiplies FP8 matrices in blocks of 16; got {list(a.shape)} and {list(b.shape)}")
    a, b = a.float(), b.float()  # like cuBLAS, and faster than torch's bf16 product on a CPU
    out = (b.t() if transB else b) @ (a.t() if transA else a)
    if alpha != 1.0:
        out = out * alpha
    bias_grad = None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = b.sum(0).to(_dtype(bias_type))
        else:
            out = out + bias
    out = out.to(dtype)
    if not transB:
        out = out.view(*B.size()[:-1], out.shape[-1])
    if D is not None:
        out = D.add_(out.view(D.shape)) if accumulate else D.copy_(out.view(D.shape))
    if quantizer is not None:
        out = quantizer(out)
    return out, bias_grad, gelu_in, extra_output


def _finish_norm(y, ln_out, quantizer, otype):
    y = y.to(_dtype(otype))
    if quantizer is not None:
        return quantizer(y)
    return y if ln_out is None else ln_out.copy_(y)


def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    x, w = input.float(), weight.float() + int(zero_centered_gamma)
    rsigma = torch.rsqrt(x.pow(2).mean(-1) + eps)
    return _finish_norm(x * rsigma[:, None] * w, ln_out, quantizer, otype), None, rsigma


def layernorm_fwd(input, weight, bias, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    x, w = input.float(), weight.float() + int(zero_centered_gamma)
    mu = x.mean(-1)
    rsigma = torch.rsqrt(x.var(-1, unbiased=False) + eps)
    y = (x - mu[:, None]) * rsigma[:, None] * w + bias.float()
    return _finish_norm(y, ln_out, quantizer, otype), mu, rsigma


def _norm_bwd(dz, x, mu, rsigma, gamma, zero_centered_gamma):
    xhat = (x.float() - (0 if mu is None else mu[:, None])) * rsigma[:, None]
    g = dz.float() * (gamma.float() + int(zero_centered_gamma))
    dx = g - xhat * (g * xhat).mean(-1, keepdim=True) - (0 if mu is None else g.mean(-1, keepdim=True))
    return (dx * rsigma[:, None]).to(x.dtype), (dz.float() * xhat).sum(0).to(gamma.dtype)


def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
    return _norm_bwd(dz, x, None, rsigma, gamma, zero_centered_gamma)


def layernorm_bwd(dz, x, mu, rsigma, gamma, sm_margin, zero_centered_gamma):
    return *_norm_bwd(dz, x, mu, rsigma, gamma, zero_centered_gamma), dz.float().sum(0).to(gamma.dtype)


# fp8, per-tensor scaling (Float8Quantizer = delayed, Float8CurrentScalingQuantizer = current) ------


def _angles(freqs, format, tokens, cu_seqlens):
    """The angles of every token, [T, 1, d] for `thd`, where each segment begins at position 0, or [T, 1, 1, d]."""
    if str(format.name) != "NVTE_THD":
        return freqs[:tokens]
    positions = torch.arange(tokens) - cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    return freqs[positions, 0]


def _rotate(t, angles, sign):
    """In fp32, like the kernel, whose result is rounded once."""
    rest, turned = t[..., angles.shape[-1] :], t[..., : angles.shape[-1]].float()
    first, second = turned.chunk(2, -1)
    turned = turned * angles.cos() + sign * torch.cat((-second, first), -1) * angles.sin()
    return torch.cat((turned.to(t.dtype), rest), -1)


def fused_rope_forward(t, freqs, start_positions, format, interleaved, cu_seqlens, cp_size, cp_rank):
    if interleaved or start_positions is not None or cp_size > 1 or freqs.dtype != torch.float32:
        raise NotImplementedError("tests.te.kernels: fused_rope_forward")
    return _rotate(t, _angles(freqs, format, t.shape[0], cu_seqlens), 1)


def fused_rope_backward(grad, freqs, format, interleaved, cu_seqlens, cp_size, cp_rank):
    return _rotate(grad, _angles(freqs, format, grad.shape[0], cu_seqlens), -1)


def _scale_of(amax, top, epsilon, power_of_2):
    """[1] the factor that scales `amax` to the largest number of the format."""
    scale = top / max(amax, epsilon, 1e-38) if amax else 1.0
    return torch.tensor([2.0 ** math.floor(math.log2(scale)) if power_of_2 else scale])


def quantize(tensor, quantizer, output=None, noop=None):
    from transformer_engine.pytorch.tensor import float8_tensor as f8

    if not isinstance(quantizer, (f8.Float8Quantizer, f8.Float8CurrentScalingQuantizer)):
        raise NotImplementedError(f"tests.te.kernels: quantize: {type(quantizer).__name__}")
    if noop is not None and noop.item():
        return output
    fp8 = _dtype(quantizer.dtype)
    top, x = torch.finfo(fp8).max, tensor.detach().float()
    amax = x.abs().max() if x.numel() else x.new_zeros(())
    if isinstance(quantizer, f8.Float8Quantizer):  # scale from the history, record amax
        scale = quantizer.scale.clone().view(1)
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    else:  # scale from this tensor
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(
                amax, torch.distributed.ReduceOp.MAX, group=quantizer._canonicalized_amax_reduction_group()
            )
        scale = _scale_of(float(amax), top, quantizer.amax_epsilon, quantizer.force_pow_2_scales)
    data = (x * scale).clamp(-top, top).to(fp8).view(torch.uint8)
    inv = scale.reciprocal()
    row = data if quantizer.rowwise_usage else None
    col = fp8_transpose(data, quantizer.dtype) if quantizer.columnwise_usage else None
    if output is not None:
        for name, new in (("_data", row), ("_transpose", col), ("_scale_inv", inv)):
            old = getattr(output, name)
            if new is not None:
                setattr(output, name, new if old is None else old.view(new.shape).copy_(new))
        output._transpose_invalid = col is None
        return output
    kw = {
        "data": row,
        "fp8_scale_inv": inv,
        "fp8_dtype": quantizer.dtype,
        "data_transpose": col,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return f8.Float8TensorStorage(**kw)
    return f8.Float8Tensor(shape=tensor.shape, dtype=tensor.dtype, requires_grad=False, **kw)


def dequantize(input, otype):
    return (input._data.view(_dtype(input._fp8_dtype)).float() * input._scale_inv).to(_dtype(otype))


def bgrad_quantize(input, quantizer):
    return input.float().sum(0).to(input.dtype), quantizer(input)


def fp8_transpose(input, dtype, *, out=None):
    t = input.reshape(-1, input.shape[-1]).t().contiguous().view(input.shape[-1], *input.shape[:-1])
    return t if out is None else out.view(t.shape).copy_(t)


def compute_amax(input, amax):
    amax.copy_(input.detach().float().abs().max())


def multi_tensor_compute_scale_and_scale_inv(chunk_size, noop, lists, max_fp8, force_pow_2_scales, epsilon):
    for amax, scale, scale_inv in zip(*lists):
        scale.copy_(_scale_of(float(amax), max_fp8, epsilon, force_pow_2_scales))
        scale_inv.copy_(scale.reciprocal())


# optimizer kernels: megatron.core uses TE's FusedAdam, l2norm and scale if TE can be imported ----


def multi_tensor_scale(chunk_size, noop, lists, scale):
    for src, dst in zip(*lists):
        dst.copy_(src * scale)


def multi_tensor_l2norm(chunk_size, noop, lists, per_tensor=False):
    norms = torch.stack([t.float().norm() for t in lists[0]])
    return norms.norm().view(1), norms if per_tensor else torch.empty(0)


def multi_tensor_adam(chunk_size, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay):
    b1, b2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for g, p, m, v, *master in zip(*lists):
        g, w = g.float(), (master[0] if master else p.float())
        if not mode:  # plain Adam: L2 in the gradient
            g = g + weight_decay * w
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        step_ = (m / b1) / ((v / b2).sqrt() + eps) + (weight_decay * w if mode else 0)
        w = w.add_(step_, alpha=-lr)
        if w is not p:
            p.copy_(w)


FUNCTIONS = (
    generic_gemm,
    rmsnorm_fwd,
    rmsnorm_bwd,
    layernorm_fwd,
    layernorm_bwd,
    fused_attn_fwd,
    fused_attn_bwd,
    fused_rope_forward,
    fused_rope_backward,
    get_fused_attn_backend,
    get_cudnn_version,
    quantize,
    dequantize,
    bgrad_quantize,
    fp8_transpose,
    compute_amax,
    multi_tensor_compute_scale_and_scale_inv,
    multi_tensor_scale,
    multi_tensor_l2norm,
    multi_tensor_adam,
)
