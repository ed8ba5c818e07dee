"""A rank of a training run that records which layers ran in FP8, with which recipe and on which tokens."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.distributed.conftest import train_one_rank
from tests.te.extension import CALLS


def train_and_look(flags: dict[str, Any], stop_after: int | None = None) -> None:
    """Trains as `train_one_rank` does and writes `seen_<rank>.json` into the run's folder.

    linears: "layer/name" of every Transformer Engine linear -> the precision of its passes, in order of first
    appearance, as "Recipe/format" or "off"; fp8_elsewhere: other modules, outside of the decoder layers, that ran
    inside an FP8 context; first_passes: for one linear, the passes whose argument marked the weights as changed;
    tokens: lengths of its inputs; optimizer: classes; calls: of stand-in kernels; histories: whether an amax was kept.
    """
    from ross_mcore.training import opening

    seen: dict[str, Any] = {}
    model: list[nn.Module] = []
    build = opening.build_engine

    def build_and_look(*args: Any, **kwargs: Any) -> Any:
        engine = build(*args, **kwargs)
        _watch(engine.model.first, seen)
        model.append(engine.model.first)
        inner = [part.optimizer for part in engine.optimizer.chained_optimizers if part.optimizer is not None]
        seen["optimizer"] = sorted({f"{type(part).__module__}.{type(part).__name__}" for part in inner})
        return engine

    opening.build_engine = build_and_look
    train_one_rank(flags, stop_after)
    seen["calls"] = dict(CALLS)
    seen["histories"] = _keeps_maxima(model[0])
    Path(flags["save"], f"seen_{os.environ['RANK']}.json").write_text(json.dumps(seen))


def looks_of(folder: Path) -> list[dict[str, Any]]:
    """The files written by the ranks of a run, in rank order."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("seen_*.json"))]


def _watch(model: nn.Module, seen: dict[str, Any]) -> None:
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    linears: dict[str, list[str]] = defaultdict(list)
    seen.update(linears=linears, fp8_elsewhere=[], first_passes=[], tokens=[])

    def linear(key: str) -> Callable[..., None]:
        def look(module: Any, *_: Any) -> None:
            recipe = module.fp8_meta.get("recipe")
            how = f"{type(recipe).__name__}/{recipe.fp8_format.name}" if module.fp8 else "off"
            if how not in linears[key]:
                linears[key].append(how)

        return look

    def elsewhere(name: str) -> Callable[..., None]:
        def look(*_: Any) -> None:
            if FP8GlobalStateManager.is_fp8_enabled() and name not in seen["fp8_elsewhere"]:
                seen["fp8_elsewhere"].append(name)

        return look

    def passes(module: Any, args: Any) -> None:
        if torch.is_grad_enabled():
            seen["first_passes"].append(module.is_first_microbatch)
            seen["tokens"].append(args[0].shape[0])

    for name, module in model.named_modules():
        if not name.startswith("language_model.decoder."):
            module.register_forward_pre_hook(elsewhere(name))
    for layer in model.decoder.layers:
        for name, module in layer.named_modules():
            if isinstance(module, TransformerEngineBaseModule) and "linear" in name:
                module.register_forward_hook(linear(f"{layer.layer_number}/{name}"))
    model.decoder.layers[0].mlp.linear_fc2.register_forward_pre_hook(passes)


def _keeps_maxima(model: nn.Module) -> bool:
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    kept = [
        bool(module.fp8_meta["scaling_fwd"].amax_history.any())
        for name, module in model.named_modules()
        if "linear_" in name
        and isinstance(module, TransformerEngineBaseModule)
        and hasattr(module.fp8_meta.get("scaling_fwd"), "amax_history")
    ]
    return bool(kept) and all(kept)
