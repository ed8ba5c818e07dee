"""Transformer Engine's compiled functions in plain torch: what `transformer_engine_torch` is in tests/te.

Names, argument orders and results are those of Transformer Engine 2.9's Python sources, which call them. Stood in for:

- fp32, bf16, unfused attention: generic_gemm, rmsnorm_fwd and _bwd, layernorm_fwd and _bwd, get_cudnn_version
- bf16 and packed attention: get_fused_attn_backend, fused_attn_fwd, fused_attn_bwd
  (cuDNN's fused attention, in its layouts BSHD, SBHD and, for packed rows with cu_seqlens, THD: no flash-attn)
- FP8 with delayed and with current scaling: quantize, dequantize, bgrad_quantize, fp8_transpose; for weights kept in
  FP8 compute_amax, multi_tensor_compute_scale_and_scale_inv
- mcore's optimizer: multi_tensor_scale, multi_tensor_l2norm, multi_tensor_adam

Every other name of the extension can be imported, used as a type and read as an enumeration, and raises when called.
"""

from __future__ import annotations

import enum
import functools
import math
import types
from collections import Counter

import torch

CALLS: Counter = Counter()
"""How often each function ran; of attention also how often for each layout of its tensors (BSHD_BSHD_BSHD, ...)."""


def _enumeration(name, **members):
    return enum.IntEnum(name, members, module="transformer_engine_torch")


DType = _enumeration(
    "DType",
    kByte=0,
    kInt16=1,
    kInt32=2,
    kInt64=3,
    kFloat32=4,
    kFloat16=5,
    kBFloat16=6,
    kFloat8E4M3=7,
    kFloat8E5M2=8,
    kFloat8E8M0=9,
    kFloat4E2M1=10,
)
FP8FwdTensors = _enumeration(
    "FP8FwdTensors",
    **{f"GEMM{i}_{n}": 3 * (i - 1) + j for i in (1, 2, 3) for j, n in enumerate(("INPUT", "WEIGHT", "OUTPUT"))},
)
FP8BwdTensors = _enumeration(
    "FP8BwdTensors", **{f"GRAD_{n}{i}": 2 * (i - 1) + j for i in (1, 2, 3) for j, n in enumerate(("OUTPUT", "INPUT"))}
)
NVTE_Fused_Attn_Backend = _enumeration(
    "NVTE_Fused_Attn_Backend", NVTE_No_Backend=-1, NVTE_F16_max512_seqlen=0, NVTE_F16_arbitrary_seqlen=1, NVTE_FP8=2
)
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
    a, b = a.float(), b.float()  # cuBLAS accumulates so, and it is faster than torch's bf16 product on a CPU
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


def _scale_of(amax, top, epsilon, power_of_2):
    """[1] what brings `amax` to the largest number of the format."""
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
    else:  # scale from this very tensor
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


# attention: cuDNN's fused kernel, needed for bf16 and for packed (thd) batches -------------------


def get_fused_attn_backend(*_args, **_kw):
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen


def get_cudnn_version():
    return 91300


def _sequences(layout, t, cu):
    """[view [heads, seq, dim] of each sequence] of a thd / bshd / sbhd tensor."""
    if "T" in layout:
        cu = cu.tolist()
        return [t[a:b].transpose(0, 1) for a, b in zip(cu[:-1], cu[1:])]
    t = t if layout.startswith("B") else t.transpose(0, 1)
    return [t[i, :n].transpose(0, 1) for i, n in enumerate((cu[1:] - cu[:-1]).tolist())]


def _attend(layout, mask, window, scale, cu_q, cu_kv, cu_q_pad, cu_kv_pad, q, k, v):
    if any(p is not None and not torch.equal(p, c) for p, c in ((cu_q_pad, cu_q), (cu_kv_pad, cu_kv))):
        raise NotImplementedError("tests.te.kernels: fused_attn: padding between packed sequences")
    layout, outs = layout.name.removeprefix("NVTE_"), []
    for qs, ks, vs in zip(_sequences(layout, q, cu_q), _sequences(layout, k, cu_kv), _sequences(layout, v, cu_kv)):
        groups, sq, sk = qs.shape[0] // ks.shape[0], qs.shape[1], ks.shape[1]
        s = qs.float() @ ks.float().repeat_interleave(groups, 0).transpose(1, 2) * scale
        rel = torch.arange(sk)[None] - torch.arange(sq)[:, None] - (sk - sq if "BOTTOM" in mask.name else 0)
        hide = (rel > 0) if "CAUSAL" in mask.name else torch.zeros(sq, sk, dtype=torch.bool)
        if window[0] >= 0:
            hide = hide | (rel < -window[0])
        p = torch.softmax(s.masked_fill(hide, -math.inf), -1)
        outs.append((p @ vs.float().repeat_interleave(groups, 0)).transpose(0, 1))
    if "T" in layout:
        return torch.cat(outs).to(q.dtype)
    longest = q.shape[1 if layout.startswith("B") else 0]
    out = torch.stack([torch.nn.functional.pad(o, (0, 0, 0, 0, 0, longest - len(o))) for o in outs], 1)
    return (out.transpose(0, 1) if layout.startswith("B") else out).contiguous().to(q.dtype)


def fused_attn_fwd(
    max_q,
    max_kv,
    is_training,
    scale,
    dropout,
    fast_zero_fill,
    layout,
    bias_type,
    mask,
    softmax_type,
    window,
    cu_q,
    cu_kv,
    q,
    k,
    v,
    fake_dtype,
    cu_q_pad,
    cu_kv_pad,
    page_k,
    page_v,
    s_quantizer,
    o_quantizer,
    attn_bias,
    softmax_offset,
    rng_gen,
    rng_elts,
    return_max_logit=False,
    cuda_graph=False,
):  # cuda_graph: TE >= 2.10
    if dropout and is_training or attn_bias is not None or s_quantizer is not None or return_max_logit:
        raise NotImplementedError("tests.te.kernels: fused_attn_fwd: dropout, bias, fp8 attention, max logit")
    CALLS[f"fused_attn_fwd {layout.name.removeprefix('NVTE_')}"] += 1
    out = _attend(layout, mask, window, scale, cu_q, cu_kv, cu_q_pad, cu_kv_pad, q, k, v)
    return out, torch.empty(0), torch.zeros(2, dtype=torch.int64)  # out, softmax stats, rng state


def fused_attn_bwd(
    max_q,
    max_kv,
    scale,
    dropout,
    fast_zero_fill,
    layout,
    bias_type,
    mask,
    softmax_type,
    window,
    deterministic,
    cu_q,
    cu_kv,
    q,
    k,
    v,
    o,
    d_o,
    fake_dtype,
    dqkv_dtype,
    aux,
    cu_q_pad,
    cu_kv_pad,
    s_quantizer,
    dp_quantizer,
    dqkv_quantizer,
    cuda_graph=False,
):
    with torch.enable_grad():
        qkv = [t.detach().requires_grad_() for t in (q, k, v)]
        out = _attend(layout, mask, window, scale, cu_q, cu_kv, cu_q_pad, cu_kv_pad, *qkv)
        return *torch.autograd.grad(out, qkv, d_o.view(out.shape)), None, None


# optimizer kernels: megatron.core takes TE's FusedAdam, l2norm and scale as soon as TE imports ----


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


class _Missing(type):
    """A name of the extension that has no stand-in: can be imported, is a type and an enumeration, cannot be called."""

    def __getattr__(cls, name):
        if name.startswith("_"):
            raise AttributeError(name)
        member = object.__new__(cls)
        member.name = name
        setattr(cls, name, member)
        return member

    def __call__(cls, *args, **kwargs):
        raise NotImplementedError(f"tests/te/kernels.py has no transformer_engine_torch.{cls.__name__}")


class Extension(types.ModuleType):
    """A module in which every name exists, see `_Missing`."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        missing = _Missing(name, (), {"__module__": "transformer_engine_torch", "__repr__": lambda self: self.name})
        setattr(self, name, missing)
        return missing


def _counted(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        CALLS[function.__name__] += 1
        with torch.no_grad():
            return function(*args, **kwargs)

    return call


def extension() -> Extension:
    """The module `transformer_engine_torch`."""
    module = Extension("transformer_engine_torch")
    for function in FUNCTIONS:
        setattr(module, function.__name__, _counted(function))
    for enumeration in ENUMS:
        setattr(module, enumeration.__name__, enumeration)
    return module


FUNCTIONS = (
    generic_gemm,
    rmsnorm_fwd,
    rmsnorm_bwd,
    layernorm_fwd,
    layernorm_bwd,
    fused_attn_fwd,
    fused_attn_bwd,
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
ENUMS = (DType, FP8FwdTensors, FP8BwdTensors, NVTE_Fused_Attn_Backend)
