"""Load offloaded weights once for many calls of a module.

accelerate keeps a module's weights in main memory or on disk; its hook on the module loads them before each call and
frees them afterwards. That is one transfer for each call, but a sweep calls a block for many edited models. Here the
same hooks load a block's weights once, and the weights stay until they are unloaded. Until then the hooks only move
inputs between devices.
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
Prefetched = dict[Key, torch.Tensor]


def offload_hooks(module: nn.Module) -> Iterator[AlignDevicesHook]:
    """Yield accelerate's hooks on the module itself that manage its weights and devices."""
    hook = vars(module).get("_hf_hook")  # in the module's own attributes: a wrapper of a module has no hook
    for single_hook in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(single_hook, AlignDevicesHook):
            yield single_hook


def offloaded(module: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    """List the module and its submodules whose weights are offloaded at present, each with its hook."""
    return [(submodule, hook) for submodule in module.modules() for hook in offload_hooks(submodule) if hook.offload]


def device_of(model: nn.Module) -> torch.device:
    """Return the device where a model starts to compute: that of its first weights, or the one they are loaded to."""
    for module in model.modules():
        for hook in offload_hooks(module):
            if hook.offload and hook.execution_device is not None:
                return torch.device(hook.execution_device)
        for parameter in module.parameters(recurse=False):
            if not parameter.is_meta:
                return parameter.device
    return torch.device("cpu")


def own_tensors(module: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    """List the module itself with its hook if its own weights are offloaded; submodules are not included."""
    return [(module, hook) for hook in offload_hooks(module) if hook.offload]


def offloaded_outside_blocks(model: nn.Module, blocks: nn.ModuleList) -> list[nn.Module]:
    """List the modules outside the blocks that have offloaded weights: embedding, final norm, unembedding.

    Some of them contain the blocks and also have a tensor of their own, so only their own tensors must be loaded
    (`loaded`).
    """
    inside = {id(module) for module in blocks.modules()}
    return [
        module
        for module in model.modules()
        if id(module) not in inside
        and any(hook.offload and not hook.place_submodules for hook in offload_hooks(module))
    ]


class OffloadedWeights:
    """Keeps offloaded weights in memory across several calls of a module.

    Modules without offloaded weights count as loaded and cost nothing.

    Attributes:
        bytes_read: bytes loaded so far, in the model's dtype; a tied weight counts once if it is loaded once.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._loaded: dict[int, list[tuple[nn.Module, AlignDevicesHook]]] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._prefetching: dict[int, Future[Prefetched]] = {}

    def load(self, *modules: nn.Module) -> None:
        """Load the weights of modules and of their submodules, except of modules that are loaded already."""
        self._load_all({module: offloaded(module) for module in modules})

    def _load_all(self, hooks_by_module: dict[nn.Module, list[tuple[nn.Module, AlignDevicesHook]]]) -> None:
        values_by_key: dict[object, torch.Tensor] = {}
        for module, offloaded_modules in hooks_by_module.items():
            if id(module) in self._loaded:
                continue
            future = self._prefetching.pop(id(module), None)
            prefetched = future.result() if future is not None else {}
            self._loaded[id(module)] = []
            for submodule, hook in offloaded_modules:
                self._load(submodule, hook, prefetched, values_by_key)
                self._loaded[id(module)].append((submodule, hook))

    def _load(
        self,
        submodule: nn.Module,
        hook: AlignDevicesHook,
        prefetched: Prefetched,
        values_by_key: dict[object, torch.Tensor],
    ) -> None:
        values = {}
        for name, _ in _hooked_tensors(submodule, hook):
            storage_key = _storage_key(hook, name)
            if storage_key not in values_by_key:  # a tied weight has two names
                value = prefetched.get((id(hook), name))
                values_by_key[storage_key] = hook.weights_map[name] if value is None else value
                self.bytes_read += values_by_key[storage_key].nbytes
            values[name] = values_by_key[storage_key]
        source = hook.weights_map
        hook.weights_map = _OverlayMap(values, source)
        try:
            hook.pre_forward(submodule)
        except BaseException:  # for example out of memory: free what was loaded
            hook.post_forward(submodule, ())
            raise
        finally:
            hook.weights_map = source
        hook.offload = False

    def prefetch(self, module: nn.Module) -> None:
        """Start reading a module's weights in a background thread, before `load` needs them."""
        if id(module) in self._loaded or id(module) in self._prefetching:
            return
        offloaded_modules = offloaded(module)
        if offloaded_modules:
            self._reader = self._reader or ThreadPoolExecutor(1, "layersurgery-weights")
            self._prefetching[id(module)] = self._reader.submit(_read_copies, offloaded_modules)

    def unload(self, *modules: nn.Module) -> None:
        """Unload the weights of modules."""
        for module in modules:
            self._unload(id(module))

    def _unload(self, module: int) -> None:
        for submodule, hook in self._loaded.pop(module, ()):
            hook.offload = True
            hook.post_forward(submodule, ())

    def cancel_prefetch(self) -> None:
        """Discard prefetched weights and stop the background thread."""
        self._prefetching.clear()
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._reader = None

    @contextmanager
    def loaded(self, *modules: nn.Module) -> Iterator[None]:
        """Keep the modules' own weights loaded inside the context; weights of their submodules are not loaded."""
        newly_loaded = [module for module in modules if id(module) not in self._loaded]
        try:
            self._load_all({module: own_tensors(module) for module in modules})
            yield
        finally:
            self.unload(*newly_loaded)


class _OverlayMap(Mapping[str, Any]):
    """Mapping that returns values already read, and looks up all others in another mapping."""

    def __init__(self, values: dict[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
        self.values_, self.rest = values, rest

    def __getitem__(self, name: str) -> Any:
        return self.values_[name] if name in self.values_ else self.rest[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rest)

    def __len__(self) -> int:
        return len(self.rest)


def _hooked_tensors(submodule: nn.Module, hook: AlignDevicesHook) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors that a hook loads, as the hook itself lists them."""
    yield from named_module_tensors(
        submodule, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )


def _storage_key(hook: AlignDevicesHook, name: str) -> object:
    """Return a key for the storage of a weight; tied weights have equal keys if that can be determined."""
    source = hook.weights_map
    while isinstance(source, PrefixedDataset):
        name, source = f"{source.prefix}{name}", source.dataset
    if isinstance(source, OffloadedWeightsLoader):
        if name in source.state_dict:
            return source.state_dict[name].data_ptr()
        entry = source.index.get(name, {})
        if entry.get("safetensors_file") is not None:
            return entry["safetensors_file"], entry.get("weight_name", name)
    return id(source), name


def _read_copies(offloaded_modules: Sequence[tuple[nn.Module, AlignDevicesHook]]) -> Prefetched:
    """Read weights into new memory: a memory-mapped file is not read before its values are used."""
    tensors: Prefetched = {}
    for submodule, hook in offloaded_modules:
        cuda = torch.device(hook.execution_device).type == "cuda" if hook.execution_device is not None else False
        for name, _ in _hooked_tensors(submodule, hook):
            value = hook.weights_map[name]
            if value.device.type == "cpu":
                value = value.pin_memory() if cuda else value.clone()
            tensors[id(hook), name] = value
    return tensors


def offloaded_bytes(offloaded_modules: Iterable[tuple[nn.Module, AlignDevicesHook]]) -> int:
    """Return the bytes read when the modules are loaded together; a tied weight counts once."""
    tensors = {
        _storage_key(hook, name): tensor.nbytes
        for submodule, hook in offloaded_modules
        for name, tensor in _hooked_tensors(submodule, hook)
    }
    return sum(tensors.values())


def distinct_tensors(module: nn.Module) -> list[torch.Tensor]:
    """List parameters and buffers; a tied tensor is listed once, even if each module has its own meta tensor for it."""
    tensors: dict[object, torch.Tensor] = {}
    for submodule in module.modules():
        hook_by_name = {
            name: hook
            for hook in offload_hooks(submodule)
            if hook.offload
            for name, _ in _hooked_tensors(submodule, hook)
        }
        for name, tensor in (*submodule.named_parameters(recurse=False), *submodule.named_buffers(recurse=False)):
            tensors.setdefault(_storage_key(hook_by_name[name], name) if name in hook_by_name else id(tensor), tensor)
    return list(tensors.values())
