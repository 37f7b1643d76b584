"""Weights that are kept elsewhere, brought in once for many calls.

accelerate's dispatch keeps a module's weights in main memory or on disk, and its hook on the module brings them in for each call and
throws them away behind it. That is one transfer a call; a sweep calls a block for many edited models. Here a block's weights are
brought in by the very same hooks, once, and stay until they are let go. Meanwhile the hooks only see to devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, named_module_tensors
from torch import nn

Key = tuple[int, str]
Fetched = dict[Key, torch.Tensor]


def offload_hooks(module: nn.Module) -> Iterator[AlignDevicesHook]:
    """accelerate's hooks on a module itself that look after its weights and devices."""
    hook = vars(module).get("_hf_hook")  # its own: what stands in for a module has none
    for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(one, AlignDevicesHook):
            yield one


def offloaded(module: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    """Modules inside, and the module itself, whose weights are elsewhere while they are not called."""
    return [(part, hook) for part in module.modules() for hook in offload_hooks(part) if hook.offload]


def device_of(model: nn.Module) -> torch.device:
    """Where a model begins to compute: the device of its first weights, or the one that they are brought to."""
    for module in model.modules():
        for hook in offload_hooks(module):
            if hook.offload and hook.execution_device is not None:
                return torch.device(hook.execution_device)
        for parameter in module.parameters(recurse=False):
            if not parameter.is_meta:
                return parameter.device
    return torch.device("cpu")


def own_tensors(module: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    """The module itself, if its own weights are elsewhere; not those inside it."""
    return [(module, hook) for hook in offload_hooks(module) if hook.offload]


def offloaded_outside_blocks(model: nn.Module, blocks: nn.ModuleList) -> list[nn.Module]:
    """Modules of a model that are in none of its blocks and have offloaded weights: embedding, final norm, unembedding.

    Some hold the blocks and have a tensor of their own beside them, so these are to be brought in by themselves (`at_home`).
    """
    inside = {id(module) for module in blocks.modules()}
    return [
        module
        for module in model.modules()
        if id(module) not in inside
        and any(hook.offload and not hook.place_submodules for hook in offload_hooks(module))
    ]


class OffloadedWeights:
    """Who is at home. Modules without offloaded weights always are, and cost nothing.

    Attributes:
        bytes_read: brought in so far, in bytes of the model's dtype; a tied weight counts once where it is brought in once.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._home: dict[int, list[tuple[nn.Module, AlignDevicesHook]]] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[Fetched]] = {}

    def load(self, *modules: nn.Module) -> None:
        """Have the weights of modules, and of all in them, at hand; of those that are not already."""
        self._load_all({module: offloaded(module) for module in modules})

    def _load_all(self, wanted: dict[nn.Module, list[tuple[nn.Module, AlignDevicesHook]]]) -> None:
        seen: dict[object, torch.Tensor] = {}
        for module, parts in wanted.items():
            if id(module) in self._home:
                continue
            coming = self._coming.pop(id(module), None)
            fetched = coming.result() if coming is not None else {}
            self._home[id(module)] = []
            for part, hook in parts:
                self._load(part, hook, fetched, seen)
                self._home[id(module)].append((part, hook))

    def _load(
        self, part: nn.Module, hook: AlignDevicesHook, fetched: Fetched, seen: dict[object, torch.Tensor]
    ) -> None:
        values = {}
        for name, _ in _tensors(part, hook):
            origin = _origin(hook, name)
            if origin not in seen:  # a tied weight is one under two names
                value = fetched.get((id(hook), name))
                seen[origin] = hook.weights_map[name] if value is None else value
                self.bytes_read += seen[origin].nbytes
            values[name] = seen[origin]
        source = hook.weights_map
        hook.weights_map = _Over(values, source)
        try:
            hook.pre_forward(part)
        except BaseException:  # memory has run out, say: what has come leaves again
            hook.post_forward(part, ())
            raise
        finally:
            hook.weights_map = source
        hook.offload = False

    def prefetch(self, module: nn.Module) -> None:
        """Begin to read a module's weights beside what else is going on; `bring` will want them next."""
        if id(module) in self._home or id(module) in self._coming:
            return
        parts = offloaded(module)
        if parts:
            self._reader = self._reader or ThreadPoolExecutor(1, "layersurgery-weights")
            self._coming[id(module)] = self._reader.submit(_read, parts)

    def unload(self, *modules: nn.Module) -> None:
        """Send the weights of modules away again."""
        for module in modules:
            self._unload(id(module))

    def _unload(self, module: int) -> None:
        for part, hook in self._home.pop(module, ()):
            hook.offload = True
            hook.post_forward(part, ())

    def cancel_prefetch(self) -> None:
        """End reading ahead."""
        self._coming.clear()
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._reader = None

    @contextmanager
    def loaded(self, *modules: nn.Module) -> Iterator[None]:
        """Inside, modules have their own weights at hand, not those of other modules in them."""
        mine = [module for module in modules if id(module) not in self._home]
        try:
            self._load_all({module: own_tensors(module) for module in modules})
            yield
        finally:
            self.unload(*mine)


class _Over(Mapping[str, Any]):
    """Weights read already, over a map that has all of them."""

    def __init__(self, values: dict[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
        self.values_, self.rest = values, rest

    def __getitem__(self, name: str) -> Any:
        return self.values_[name] if name in self.values_ else self.rest[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rest)

    def __len__(self) -> int:
        return len(self.rest)


def _tensors(part: nn.Module, hook: AlignDevicesHook) -> Iterator[tuple[str, torch.Tensor]]:
    """What a hook brings in, as the hook itself lists it."""
    yield from named_module_tensors(
        part, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )


def _origin(hook: AlignDevicesHook, name: str) -> object:
    """Where a weight is kept; the same for tied ones where that can be told."""
    source = hook.weights_map
    while isinstance(source, PrefixedDataset):
        name, source = f"{source.prefix}{name}", source.dataset
    if isinstance(source, OffloadedWeightsLoader):
        if name in source.state_dict:
            return source.state_dict[name].data_ptr()
        kept = source.index.get(name, {})
        if kept.get("safetensors_file") is not None:
            return kept["safetensors_file"], kept.get("weight_name", name)
    return id(source), name


def _read(parts: Sequence[tuple[nn.Module, AlignDevicesHook]]) -> Fetched:
    """The weights themselves, in memory of their own: a mapped file is read only when somebody looks."""
    found: Fetched = {}
    for part, hook in parts:
        cuda = torch.device(hook.execution_device).type == "cuda" if hook.execution_device is not None else False
        for name, _ in _tensors(part, hook):
            value = hook.weights_map[name]
            if value.device.type == "cpu":
                value = value.pin_memory() if cuda else value.clone()
            found[id(hook), name] = value
    return found


def bytes_of(parts: Iterable[tuple[nn.Module, AlignDevicesHook]]) -> int:
    """Bytes that bringing modules in together reads; a tied weight counts once."""
    found = {_origin(hook, name): tensor.nbytes for part, hook in parts for name, tensor in _tensors(part, hook)}
    return sum(found.values())


def distinct_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, tied ones once: also where each of the modules that share one has a stand-in of its own for it."""
    found: dict[object, torch.Tensor] = {}
    for part in module.modules():
        away = {name: hook for hook in offload_hooks(part) if hook.offload for name, _ in _tensors(part, hook)}
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            found.setdefault(_origin(away[name], name) if name in away else id(tensor), tensor)
    return list(found.values())
