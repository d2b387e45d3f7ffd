"""What a run is computed on: device, precision, compilation, and the ranks that share the work.

Started by `torchrun`, every GPU (or CPU process) is a rank. Each computes its part of every batch,
gradients are averaged between them, and the model comes out as if one rank had done it all:

    torchrun --nproc_per_node=2 train_pretrain.py --recipe v4
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hamner.errors import UserError
from hamner.recipe import Recipe
from model import Transformer

T = TypeVar("T")
PATIENCE = timedelta(hours=7)  # ranks wait for one whose source is away; see hamner/hub.py
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Machine:
    """This process's device, and its place among the ranks."""

    device: torch.device
    rank: int = 0
    ranks: int = 1

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on each."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def highest(self, number: int) -> int:
        """The largest of the ranks' numbers, on each; the device isn't waited for."""
        if self.ranks == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, on each, in order."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def from_leader(self, make: Callable[[], T]) -> T:
        """What `make` makes on the rank that leads, on each.

        Raises:
            UserError: `make` raised it; so that no rank waits for one that has gone.
        """
        if self.ranks == 1:
            return make()
        value: list[Any] = [None, None]
        if self.leads:
            try:
                value = [make(), None]
            except UserError as error:
                value = [None, str(error)]
        dist.broadcast_object_list(value, device=torch.device("cpu"))
        if value[1] is not None:
            raise UserError(value[1])
        return cast(T, value[0])

    def wait_for_all(self) -> None:
        self.highest(0)


def pick_device(name: str) -> torch.device:
    """`auto` is cuda if there is one, then mps, then cpu.

    Raises:
        UserError: a device that this machine hasn't got.
    """
    available = {"cpu": True, "mps": torch.backends.mps.is_available()}
    available["cuda"] = torch.cuda.is_available()
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: give auto, cuda, cuda:1, mps or cpu") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not available.get(device.type, False) or (device.index or 0) >= count:
        raise UserError(f"--device {name}: there is no such device here; leave it to auto")
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that a run may take on a device, as far as it can be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def join(device_name: str) -> Machine:
    """This process's machine; among other ranks if torchrun started it.

    A rank that doesn't lead prints nothing: its standard output goes nowhere.

    Raises:
        UserError: no such device, or fewer GPUs here than ranks.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        return Machine(pick_device(device_name))
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = pick_device(device_name)
    if device.type == "cuda":
        device = pick_device(f"cuda:{local}")
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"{ranks} processes on {device}: several need cuda or cpu")
    if not dist.is_initialized():
        # Numbers of the host's go over gloo, so that asking for them doesn't wait for a GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
    return Machine(device, rank, ranks)


def leave() -> None:
    """Part from the other ranks in good order."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------ the model


def why_not_compile(device: torch.device) -> str | None:
    """The reason why torch.compile can't work here; None if it can."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "no C++ compiler"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "no triton"
    return "not supported on mps" if device.type == "mps" else None


def prepare_model(model: Transformer, recipe: Recipe, machine: Machine) -> nn.Module:
    """Bring a model to its device, with what the recipe says of recomputing, compiling, sharing.

    Returns what is to be called for a loss: the model itself, or what averages its gradients over
    the ranks. Parameter names stay what they are, so checkpoints know nothing of it.
    """
    layers = model.model.layers
    sharded = machine.ranks > 1 and recipe.parallel == "fsdp"
    if not sharded:
        model.to(machine.device)
    if recipe.gradient_checkpointing:
        for layer in layers:
            layer.forward = recomputing(layer.forward)
    if recipe.compile:
        compile_layers(model, machine)
    if sharded:
        shard(model, recipe, machine)
    if machine.ranks == 1 or sharded:
        return model
    devices = [machine.device] if machine.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    # All ranks have the same buffers; older torch calls the switch by another name.
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=devices,
        gradient_as_bucket_view=True,
        **{buffers: False},  # type: ignore[arg-type]
    )


def compile_layers(model: Transformer, machine: Machine) -> None:
    """Compile each layer's forward: one compilation serves all, as they have the same code."""
    reason = why_not_compile(machine.device)
    if reason:
        print(f"not compiled: {reason}")
        return
    model.model.compiled = True
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward)


def shard(model: Transformer, recipe: Recipe, machine: Machine) -> None:
    """FSDP2: every rank keeps a part of each weight, layer by layer, and gathers it for its use."""
    mesh = init_device_mesh(machine.device.type, (machine.ranks,))
    policy = MixedPrecisionPolicy()
    if recipe.precision in ("fp16", "bf16"):
        dtype = PRECISIONS[recipe.precision]
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for name, buffer in model.named_buffers():
        if buffer.device.type != machine.device.type:
            raise RuntimeError(f"buffer {name} stayed on {buffer.device}")


def recomputing(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A forward that keeps its inputs alone and runs again in the backward pass."""

    def recomputed(*inputs: Any) -> Tensor:  # a function of ours, so that it can be compiled
        return checkpoint(forward, *inputs, use_reentrant=False)

    return recomputed


def precision_on(device_type: str, recipe: Recipe) -> str:
    """The recipe's precision; `auto` is 16 bits where the device multiplies faster in them."""
    if recipe.precision != "auto":
        return recipe.precision
    if device_type == "cuda":
        return "fp16"
    return "bf16" if device_type == "cpu" and cpu_multiplies_bf16() else "fp32"


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products in bf16: AVX512-BF16, or AMX."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


@contextlib.contextmanager
def without_averaging(model: nn.Module, *, unless: bool) -> Any:
    """Gradients of the backward passes inside stay this rank's own, `unless` it is said otherwise.

    All micro-batches but a step's last are run so: what they add up to is averaged once.
    """
    if isinstance(model, DistributedDataParallel) and not unless:
        with model.no_sync():
            yield
        return
    set_sync = getattr(model, "set_requires_gradient_sync", None)  # FSDP2's
    if set_sync is not None:
        set_sync(unless)
    yield


def whole(state: Any, *, keep: bool) -> Any:
    """A state with every tensor that is spread over the ranks put together.

    All ranks have to take part; one that isn't to `keep` what comes of it gets None for a tensor.
    """
    if isinstance(state, DTensor):
        tensor = state.full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: whole(value, keep=keep) for key, value in state.items()}
    return [whole(value, keep=keep) for value in state] if isinstance(state, list) else state


def whole_weights(model: Transformer, *, keep: bool) -> dict[str, Tensor]:
    """The model's state dict, put together; tied weights are one tensor under two names."""
    weights = dict(model.state_dict())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    result: dict[str, Tensor] = whole(
        {name: weight for name, weight in weights.items() if not (tied and "lm_head" in name)},
        keep=keep,
    )
    if tied:
        result["lm_head.weight"] = result["model.embed_tokens.weight"]
    return result
