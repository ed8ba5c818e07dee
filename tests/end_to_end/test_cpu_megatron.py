"""The patches of cpu_megatron.py: with all of them mcore's code runs on a CPU; without any one of them it fails.

When a newer megatron-core no longer needs a patch, its row fails: remove the patch.

A separate process runs all rows. It imports megatron.core before the hook is installed, so that patching of loaded
modules is tested too. Its process group is torch's fake one: the first of four ranks, in which two pipeline stages are
replicated twice.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from ross_mcore.cpu_megatron import PATCHES, OnCpu, function_of
from ross_mcore.megatron_hook import Hook, hide_warnings, install

ROOT = Path(__file__).parents[2]


def core(name: str) -> Any:
    return importlib.import_module(f"megatron.core.{name}")


def compile_nothing() -> None:
    assert not hasattr(core("activations").quick_gelu, "_torchdynamo_orig_callable")


def differentiate_swiglu() -> None:
    """Without the patch the gradient is right, in eleven passes over memory, of which the last joins its halves."""
    gate_and_up = torch.randn(4, 6, requires_grad=True)
    gate, up = gate_and_up.chunk(2, -1)
    gradient = torch.randn(4, 3)
    (expected,) = torch.autograd.grad(torch.nn.functional.silu(gate) * up, gate_and_up, gradient)
    with mock.patch.object(torch, "cat", side_effect=RuntimeError):
        found = core("fusions.fused_bias_swiglu").swiglu_back(gradient, gate_and_up.detach())
    torch.testing.assert_close(found, expected)


def add_a_gradient() -> None:
    """To what is there, in fp32 and from 16 bits."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs, gradients, found = torch.ones(2, 4, dtype=dtype), torch.ones(2, 3, dtype=dtype), torch.ones(3, 4)
        core("tensor_parallel.layers").fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, gradients, found)
        assert torch.equal(found, torch.full((3, 4), 3.0))


def read_the_generator() -> None:
    core("tensor_parallel.random")._get_cuda_rng_state()


def set_the_generator() -> None:
    """torch's own function only adds the call to a list for the initialization of CUDA."""
    state = torch.get_rng_state()
    torch.manual_seed(7)
    core("tensor_parallel.random")._set_cuda_rng_state(state)
    assert torch.equal(torch.get_rng_state(), state)


def draw_within_a_region() -> None:
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    tracker = core("tensor_parallel.random").CudaRNGStatesTracker()
    tracker.add("any", 1)
    with mock.patch.object(logger, "callHandlers") as warn, tracker.fork("any"):
        torch.rand(1)
    warn.assert_not_called()


def free_what_is_sent() -> None:
    """The tensor to send, and the request, outlive the output tensor that the schedule frees."""
    sent: list[Any] = []

    class Request:
        pass

    def isend(tensor: Any, **_: Any) -> Request:
        request = Request()
        sent.extend((tensor, weakref.ref(request)))
        return request

    output = torch.ones(3)
    with mock.patch.object(torch.distributed, "isend", isend):
        core("pipeline_parallel.p2p_communication")._p2p_ops(
            tensor_send_prev=None,
            tensor_recv_prev=None,
            tensor_send_next=output,
            tensor_recv_next=None,
            group=torch.distributed.group.WORLD,
            prev_pipeline_rank=1,
            next_pipeline_rank=1,
        )
    core("pipeline_parallel.schedules").deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
    assert sent[0].numel() == 3 and sent[1]() is not None


def group_buckets() -> None:
    def buffer(dtype: Any) -> SimpleNamespace:
        bucket = SimpleNamespace(dtype=dtype, params_list=[])
        return SimpleNamespace(
            buckets=[bucket],
            param_dtype=dtype,
            ddp_config=core("distributed").DistributedDataParallelConfig(),
            data_parallel_group=torch.distributed.group.WORLD,
            data_parallel_world_size=4,
        )

    parallel = core("distributed.distributed_data_parallel")
    groups = parallel.partition_buckets([buffer(torch.uint8), buffer(torch.bfloat16)])
    assert all(len({bucket.dtype for bucket in group.buckets}) == 1 for group in groups)


def seed() -> None:
    random = core("tensor_parallel.random")
    with mock.patch.object(random.CudaRNGStatesTracker, "add"):
        random.model_parallel_cuda_manual_seed(5, tp_rank=0, ep_rank=0, etp_rank=0)
    assert torch.initial_seed() == 5


def backward_of_a_linear() -> None:
    context = SimpleNamespace(
        saved_tensors=(torch.ones(2, 3), torch.ones(4, 3)),
        **dict.fromkeys(("use_bias", "gradient_accumulation_fusion", "allreduce_dgrad", "main_grad")),
        sequence_parallel=True,
        grad_output_buffer=None,
        wgrad_deferral_limit=0,
        tp_group=torch.distributed.group.WORLD,
    )
    function_of(core("tensor_parallel.layers"), "LinearWithGradAccumulationAndAsyncCommunication.backward")(
        context, torch.ones(8, 4)
    )


def rotary_embedding() -> None:
    rotary = core("models.common.embeddings.rotary_pos_embedding")
    rotary.RotaryEmbedding(kv_channels=4, rotary_percent=1.0, use_cpu_initialization=True).get_emb(2)


def tie_embeddings() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    core("models.common.language_module.language_module").LanguageModule.setup_embeddings_and_output_layer(
        SimpleNamespace(
            config=SimpleNamespace(pipeline_model_parallel_size=2),
            pre_process=True,
            post_process=False,
            share_embeddings_and_output_weights=True,
            embedding=SimpleNamespace(word_embeddings=SimpleNamespace(weight=weight)),
            vp_stage=None,
            vp_size=None,
            pp_group=torch.distributed.group.WORLD,
            embd_group=torch.distributed.group.WORLD,
            shared_embedding_or_output_weight=lambda: weight,
            _is_in_embd_group=lambda: True,
        )
    )


class Model(torch.nn.Linear):
    """Two weights, with the master of one on each data-parallel rank, and the attributes that mcore needs of a
    model."""

    def __init__(self, dtype: Any = torch.float32, **options: Any) -> None:
        super().__init__(2, 2, dtype=dtype)
        self.config = core("transformer").TransformerConfig(
            num_layers=2, hidden_size=2, num_attention_heads=1, pipeline_dtype=torch.float32, **options
        )
        self.model_type = core("enums").ModelType.encoder_or_decoder

    def set_input_tensor(self, _: Any) -> None:
        pass


def schedule(name: str, chunks: int = 1, **options: Any) -> Callable[[], None]:
    def run() -> None:
        models = [Model(**options) for _ in range(chunks)]
        getattr(core("pipeline_parallel.schedules"), name)(
            forward_step_func=lambda data, model: (model(torch.ones(1, 1, 2)), lambda output: (output.sum(), {})),
            data_iterator=[None] * chunks,
            model=models,
            num_microbatches=2,
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
        )

    return run


def receive() -> None:
    p2p = core("pipeline_parallel.p2p_communication")
    communicator = p2p.P2PCommunicator(torch.distributed.group.WORLD, Model(batch_p2p_comm=True).config)
    communicator._communicate(
        tensor_send_next=None, tensor_send_prev=None, recv_prev=False, recv_next=True, tensor_shape=(1,)
    )


def optimizer(sharded: bool = True, dtype: Any = torch.bfloat16) -> Any:
    from ross_mcore.engine import adam

    adam.install()
    distributed, optimizers = core("distributed"), core("optimizer")
    model = Model(dtype, bf16=dtype == torch.bfloat16)
    parallel = distributed.DistributedDataParallel(
        model.config, distributed.DistributedDataParallelConfig(use_distributed_optimizer=sharded), model
    )
    config = optimizers.OptimizerConfig(
        optimizer="adam", lr=1.0, bf16=dtype == torch.bfloat16, use_distributed_optimizer=sharded
    )
    return optimizers.get_megatron_optimizer(config, [parallel], use_gloo_process_groups=False).chained_optimizers[0]


def shard_the_optimizer() -> None:
    """Weights with a master on another rank are marked too."""
    assert all(weight.main_param_sharded for chunk in optimizer().model_chunks for weight in chunk.parameters())


def clip() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    core("optimizer.clip_grads").clip_grad_by_total_norm_fp32([weight], max_norm=0.1, total_norm=1.4)


SCHEDULES = "pipeline_parallel.schedules:forward_backward_"
MAPPINGS = "tensor_parallel.mappings:"
DISTRIBUTED_OPTIMIZER = "optimizer.distrib_optimizer:DistributedOptimizer."
USES: dict[str, Callable[[], object]] = {
    "jit:never_compile": compile_nothing,
    "fusions.fused_bias_swiglu:swiglu_back": differentiate_swiglu,
    "tensor_parallel.layers:fused_weight_gradient_mlp_cuda": add_a_gradient,
    "tensor_parallel.random:_get_cuda_rng_state": read_the_generator,
    "tensor_parallel.random:_set_cuda_rng_state": set_the_generator,
    "tensor_parallel.random:its logger": draw_within_a_region,
    "pipeline_parallel.p2p_communication:_p2p_ops": free_what_is_sent,
    "distributed.distributed_data_parallel:partition_buckets": group_buckets,
    "utils:GlobalMemoryBuffer.get_tensor": lambda: (
        core("utils").GlobalMemoryBuffer().get_tensor((2,), torch.float32, "any")
    ),
    "tensor_parallel.random:CudaRNGStatesTracker.add": lambda: (
        core("tensor_parallel.random").CudaRNGStatesTracker().add("any", 1)
    ),
    "tensor_parallel.random:model_parallel_cuda_manual_seed": seed,
    **{
        f"{MAPPINGS}{name}": lambda name=name: getattr(core("tensor_parallel.mappings"), name)(
            torch.ones(4, 4), torch.distributed.group.WORLD
        )
        for name in ("_gather_along_last_dim", "_gather_along_first_dim", "_reduce_scatter_along_first_dim")
    },
    "tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication.backward": backward_of_a_linear,
    "models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.get_emb": rotary_embedding,
    "models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer": tie_embeddings,
    f"{SCHEDULES}no_pipelining": schedule("forward_backward_no_pipelining"),
    f"{SCHEDULES}pipelining_without_interleaving": schedule("forward_backward_pipelining_without_interleaving"),
    f"{SCHEDULES}pipelining_with_interleaving": schedule(
        "forward_backward_pipelining_with_interleaving",
        2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
    ),
    "pipeline_parallel.p2p_communication:P2PCommunicator._communicate": receive,
    "distributed.param_and_grad_buffer:_ParamAndGradBuffer.__init__": optimizer,
    "optimizer.optimizer:FP32Optimizer.__init__": lambda: optimizer(sharded=False, dtype=torch.float32),
    "optimizer.optimizer:MixedPrecisionOptimizer.__init__": lambda: optimizer(sharded=False),
    "optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__": lambda: optimizer(sharded=False),
    f"{DISTRIBUTED_OPTIMIZER}__init__": shard_the_optimizer,
    f"{DISTRIBUTED_OPTIMIZER}_build_model_and_main_param_groups": optimizer,
    "optimizer.clip_grads:clip_grad_by_total_norm_fp32": clip,
}
"""Module of mcore and the patched name -> a use of it."""

ON_CPU = {
    f"{module.removeprefix('megatron.core.')}:{name}"
    for module, patches in PATCHES.items()
    for patch in patches
    if isinstance(patch, OnCpu)
    for name in patch.functions
}
COMPILED = "jit:never_compile"
"""The one row whose patch cannot be undone: it is tried before and after."""


def place_of(row: str) -> tuple[Any, str]:
    """The place that a row's patch sets: an attribute of a function, a module or its logger."""
    module, _, name = row.partition(":")
    if row in ON_CPU:
        return function_of(core(module), name), "__code__"
    return (logging.getLogger(f"megatron.core.{module}"), "filters") if "logger" in name else (core(module), name)


def failure_of(use: Callable[[], object]) -> str | None:
    try:
        use()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def try_all() -> dict[str, tuple[str | None, str | None]]:
    """Row -> the error of its use without its patch but with all others, and with all; None for no error."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Hook)]
    for module in PATCHES:
        importlib.import_module(module)
    places = {row: place_of(row) for row in USES if row != COMPILED}
    plain = {row: copy.copy(getattr(*place, None)) for row, place in places.items()}
    compiled = failure_of(USES[COMPILED])
    install()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    core("parallel_state").initialize_model_parallel(pipeline_model_parallel_size=2, create_gloo_process_groups=False)
    failures = {COMPILED: (compiled, failure_of(USES[COMPILED]))}
    for row, (owner, name) in places.items():
        patched = getattr(owner, name)
        setattr(owner, name, plain[row])
        without = failure_of(USES[row])
        setattr(owner, name, patched)
        failures[row] = without, failure_of(USES[row])
    return failures


@pytest.fixture(scope="module")
def failures() -> dict[str, tuple[str | None, str | None]]:
    command = [sys.executable, "-m", "tests.end_to_end.test_cpu_megatron"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("row", USES)
def test_a_patch_is_needed_and_enough(row: str, failures: dict[str, tuple[str | None, str | None]]) -> None:
    without, patched = failures[row]
    assert patched is None
    assert without is not None, "this megatron-core no longer needs the patch"


def test_every_patch_has_a_row() -> None:
    replacing = {module for module, patches in PATCHES.items() if any(not isinstance(p, OnCpu) for p in patches)}
    assert set(USES) >= ON_CPU
    assert {f"megatron.core.{row.partition(':')[0]}" for row in set(USES) - ON_CPU} == replacing


def test_only_named_warnings_are_hidden() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_warnings()
        for message in ("Apex is not installed. Falling back to Torch Norm", "anything else"):
            warnings.warn_explicit(message, UserWarning, "backends.py", 21, "megatron.core.models.backends")
    assert [str(warning.message) for warning in shown] == ["anything else"]


if __name__ == "__main__":
    print(json.dumps(try_all()))
