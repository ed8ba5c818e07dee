"""The table of layouts: each row must train as one process does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """`world` processes with `flags` on `data`, compared with one process on the same stage, data and family."""

    name: str
    world: int
    flags: dict[str, Any] = field(default_factory=dict)
    stage: str = "finetune"
    data: str = "mixed"
    family: str = "qwen2_siglip"
    common: tuple[tuple[str, Any], ...] = ()
    """Flags of the reference run too."""
    relative: float = 1e-5
    """Tolerance for fp32 sums in another order: measured up to 4e-7 on losses and norms, 8e-7 of the largest gradient
    of a family."""

    @property
    def reference(self) -> Case:
        """The same work in one process."""
        return Case("tp1", 1, stage=self.stage, data=self.data, family=self.family, common=self.common)


def layout(tensor: int = 1, pipeline: int = 1, **more: Any) -> dict[str, Any]:
    return {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, **more}


REFERENCE_ARITHMETIC = (
    ("loss_normalization", "microbatch"),
    ("vm_loss_rows", "all"),
    ("weight_decay", 0.1),
    ("decay_norm_weights", True),
)

BY_MODALITY = (("sampler", "modality_length"), ("mm_use_im_start_end", True))

PACKED = (("pack", True), ("seq_length", 256), ("global_batch_size", 2), ("micro_batch_size", 1))
"""Two rows of several samples a step."""

INTERLEAVED = {"num_layers_per_virtual_pipeline_stage": 1, "micro_batch_size": 1}
"""Two chunks to a stage of the recorded models, which have four layers; twice that many for PP 4 (`deep`)."""

GATHERED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}

BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
SELECTED = {"recompute_granularity": "selective", "recompute_modules": "core_attn,mlp"}
AGAIN = {"recompute_denoiser": True}

CASES = [
    Case("tp2", 2, layout(2)),
    Case("tp2+sp", 2, layout(2, sequence_parallel=True)),
    Case("pp2", 2, layout(1, 2)),
    Case("pp3", 3, layout(1, 3)),
    Case(
        "pp2 uneven, more layers recomputed than one stage has",
        2,
        layout(1, 2, pipeline_layout="3,1", **BLOCK, **AGAIN),
    ),
    Case("tp2xpp2", 4, layout(2, 2)),
    Case("tp2xpp2+sp", 4, layout(2, 2, sequence_parallel=True)),
    Case("dp2", 2),
    Case("dp2 overlap", 2, layout(overlap_grad_reduce=True)),
    Case("dp2 distributed optimizer", 2, layout(use_distributed_optimizer=True)),
    Case("tp2xdp2 distributed optimizer", 4, layout(2, use_distributed_optimizer=True, overlap_grad_reduce=True)),
    Case("tp2xdp2 parameter gather overlaps", 4, layout(2, **GATHERED)),
    Case("tp2+sp recomputes attention and MLP", 2, layout(2, sequence_parallel=True, **SELECTED, **AGAIN)),
    Case("pp2 frozen LLM", 2, layout(1, 2), stage="pretrain"),
    Case("pp3 frozen LLM, middle stage trains nothing, overlap", 3, layout(1, 3, **GATHERED), stage="pretrain"),
    Case("tp2xpp2 frozen LLM", 4, layout(2, 2, sequence_parallel=True), stage="pretrain"),
    Case("pp2 text only", 2, layout(1, 2), data="text_only"),
    Case("tp2 text only", 2, layout(2), data="text_only"),
    Case("dp2, one rank has no image", 2, layout(overlap_grad_reduce=True), data="sparse"),
    Case("tp2xpp2, one tensor rank has no image", 4, layout(2, 2), data="sparse"),
    Case("pp2 tied embeddings", 2, layout(1, 2), family="tied"),
    Case("tp2xpp2+sp tied embeddings", 4, layout(2, 2, sequence_parallel=True), family="tied"),
    Case("tp2 tied embeddings", 2, layout(2), family="tied"),
    Case("tp2xpp2 vision tower trains", 4, layout(2, 2), common=(("vision_lr", 1e-4),)),
    Case(
        "dp2 text only, vision tower trains",
        2,
        layout(overlap_grad_reduce=True),
        "finetune",
        "text_only",
        common=(("vision_lr", 1e-4),),
    ),
    Case(
        "no denoiser learning rate of its own, clipping off, tp2",
        2,
        layout(2),
        common=(("denoiser_lr", None), ("clip_grad", 0.0)),
    ),
    Case("reference arithmetic tp2xpp2", 4, layout(2, 2), common=REFERENCE_ARITHMETIC),
    Case(
        "reference arithmetic tp2xdp2, one rank has no image", 4, layout(2), data="sparse", common=REFERENCE_ARITHMETIC
    ),
    Case("by modality and length, other micro-batches", 4, layout(2, micro_batch_size=1), common=BY_MODALITY),
    Case("packed tp2xpp2+sp", 4, layout(2, 2, sequence_parallel=True), common=PACKED),
    Case("packed pp3", 3, layout(1, 3), common=PACKED),
    Case("packed dp2 recompute", 2, layout(recompute_granularity="full", micro_batch_size=1), common=PACKED),
    Case("packed pp2 frozen LLM", 2, layout(1, 2), stage="pretrain", common=(*PACKED, ("template", "qwen_2"))),
    Case("two data sets dp2", 2, data="mixture"),
    Case("two data sets, packed, tp2xpp2+sp", 4, layout(2, 2, sequence_parallel=True), data="mixture", common=PACKED),
    Case("several pictures tp2xpp2+sp", 4, layout(2, 2, sequence_parallel=True), data="several"),
    Case("several pictures packed tp2xpp2+sp", 4, layout(2, 2, sequence_parallel=True), data="several", common=PACKED),
    Case("several pictures packed dp2", 2, layout(micro_batch_size=1), data="several", common=PACKED),
    # bf16 has 8 bits (4e-3): sums in another order round differently; measured up to 5e-4 on losses
    # and norms, 1.5e-2 of the largest gradient of a family
    Case("bf16 dp2", 2, common=(("bf16", True),), relative=3e-2),
    Case("bf16 tp2xpp2+sp", 4, layout(2, 2, sequence_parallel=True), common=(("bf16", True),), relative=3e-2),
    Case("bf16 pp3 frozen LLM", 3, layout(1, 3), stage="pretrain", common=(("bf16", True),), relative=3e-2),
    Case("llama + clip tp2xpp2", 4, layout(2, 2), family="llama_clip"),
    Case("pp2xvpp2", 2, layout(1, 2, **INTERLEAVED)),
    Case("pp4xvpp2", 4, layout(1, 4, **INTERLEAVED), family="deep"),
    Case("pp4xvpp2 without overlap", 4, layout(1, 4, overlap_p2p_communication=False, **INTERLEAVED), family="deep"),
    Case("tp2xpp2xvpp2+sp", 4, layout(2, 2, sequence_parallel=True, **INTERLEAVED)),
    Case(
        "pp2xvpp2xdp2 distributed optimizer, overlap",
        4,
        layout(1, 2, use_distributed_optimizer=True, overlap_grad_reduce=True, **INTERLEAVED),
    ),
    Case("pp2xvpp2xdp2 parameter gather overlaps", 4, layout(1, 2, **GATHERED, **INTERLEAVED)),
    Case("pp2xvpp2 tied embeddings", 2, layout(1, 2, **INTERLEAVED), family="tied"),
    Case("pp2xvpp2 frozen LLM", 2, layout(1, 2, **INTERLEAVED), stage="pretrain"),
    Case("pp2xvpp2 packed, by a layout", 2, layout(1, 2, pipeline_layout="1,1,1,1"), common=PACKED),
]
