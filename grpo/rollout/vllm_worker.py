"""vLLM's side of a weight update. Runs in vLLM's workers, which import it before they build the model:

    --worker-extension-cls grpo.rollout.vllm_worker.Extension --weight-transfer-config '{"backend": "grpo"}'

vLLM's own transfers work between GPUs, and need vLLM in the trainer's environment. This one goes through the same
endpoints (init, start, update, finish), but over a process group of torch: NCCL between GPUs, gloo anywhere. The
trainer needs nothing but torch. It needs nothing of the trainer but this folder.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

BACKEND = "grpo"
"""The name of this transfer in vLLM's --weight-transfer-config."""


def rendezvous(host: str, port: int, world: int, seconds: float, *, master: bool) -> dist.Store:
    """Return the store through which a trainer (the master; port 0 = any free one) and a server's workers connect."""
    return dist.TCPStore(
        host, port, world, is_master=master, timeout=timedelta(seconds=seconds), wait_for_workers=False
    )


def transfer_group(store: dist.Store, transport: str, rank: int, world: int, seconds: float) -> Any:
    """Return a process group for the weights, separate from every other group. Rank 0 is the trainer.

    Blocks until all ranks have joined. Each broadcast raises after `seconds` without the others.
    """
    store = dist.PrefixStore("weights", store)
    timeout = timedelta(seconds=seconds)
    if transport == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, world, options)
    return dist.ProcessGroupGloo(store, rank, world, timeout)


@dataclass
class Rendezvous:
    """The body of /init_weight_transfer_engine."""

    host: str
    port: int
    world: int
    transport: str
    seconds: float


@dataclass
class Parcel:
    """The body of /update_weights: some of the weights, in the order in which they are broadcast."""

    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)


def start_reload(model: Any, config: Any) -> None:
    """Begin a reload, in which vLLM converts loaded weights to the layout of its kernels."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    finalize_layerwise_reload(model, config)  # of a trainer that died within a reload
    initialize_layerwise_reload(model)


def finish_reload(model: Any, config: Any) -> None:
    """End a reload."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, config)


class Extension:
    """Mixin of vLLM's worker class: loads weights by reference, for an engine in the trainer's own process."""

    def load_plain_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        start_reload(runner.model, runner.model_config)
        runner.model.load_weights(weights)
        finish_reload(runner.model, runner.model_config)


def register() -> None:
    """Register the transfer in this process's vLLM, and make its models reloadable on a CPU. Call before a model is "
    "built."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # vLLM packs linear weights for oneDNN and drops the originals; a head that is tied to the embeddings gets a
        # packed copy of its own, which no reload refreshes: the update would succeed, and the old head go on sampling.
        import vllm._custom_ops

        vllm._custom_ops._supports_onednn = False

    class GroupTransfer(WeightTransferEngine):
        init_info_cls, update_info_cls = Rendezvous, Parcel
        group: Any = None

        def init_transfer_engine(self, there: Rendezvous) -> None:
            workers = self.parallel_config.world_size  # of one replica
            rank = 1 + self.parallel_config.data_parallel_index * workers + self.parallel_config.rank
            store = rendezvous(there.host, there.port, there.world, there.seconds, master=False)
            self.place = self.device if there.transport == "nccl" else torch.device("cpu")
            self.group = transfer_group(store, there.transport, rank, there.world, there.seconds)

        def start_weight_update(self) -> None:
            start_reload(self.model, self.model_config)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))
            if self.place.type == "cuda":  # the base class synchronizes always, which raises without an accelerator
                torch.accelerator.synchronize()

        def receive_weights(self, parcel: Parcel) -> None:
            self.model.load_weights(self._unpack(parcel))

        def _unpack(self, parcel: Parcel) -> Iterator[tuple[str, Tensor]]:
            for name, dtype, shape in zip(parcel.names, parcel.dtypes, parcel.shapes, strict=True):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.place)
                self.group.broadcast(tensor, 0).wait()
                yield name, tensor

        def finish_weight_update(self) -> None:
            finish_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            self.group = None

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, GroupTransfer)


if sys.modules.get("vllm") is not None:  # in a worker; elsewhere this file is the trainer's half of the rendezvous
    register()
