"""cuDNN's fused attention in plain torch, needed for bf16 and for packed rows; no flash-attn.

Its layouts are BSHD, SBHD and, for packed rows with cu_seqlens, THD.
"""

from __future__ import annotations

import math

import torch

from tests.te.extension import CALLS, NVTE_Fused_Attn_Backend


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
        raise NotImplementedError("tests.te.attention: fused_attn: padding between packed sequences")
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
        raise NotImplementedError("tests.te.attention: fused_attn_fwd: dropout, bias, fp8 attention, max logit")
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
