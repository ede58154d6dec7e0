"""What tells models apart, by content: weights, and everything else that changes what a network computes.

    network    the class of each part, its attributes (FreeU's factors, attention processors, scales of adapters), its
               hooks in their order, parametrizations, and every tensor by a checksum of all of it
    function   its name, the code of one that no installed library has, what it closes over, globals that it reads
    object     its class and attributes

Equal models have equal digests in every process, on every device and in every memory format; whether they train, need
gradients or are compiled makes no difference, nor where their weights are kept. What cannot be read so (a C object, a
generator, weights that are not there) has no digest at all: a resumed run then recomputes an edge instead.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import json
import logging
import re
import sysconfig
import types
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BLOCK = 4096  # words that one checksum covers
SAMPLE = 64  # entries of a tensor that are read as they are
WHOLE = 1 << 16  # bytes of a tensor that is read as it is
# Bookkeeping of torch and of hubs: what is left of a module's attributes changes what it computes.
_BOOKKEEPING = frozenset(vars(nn.Module())) | {
    *(
        "_compiled_call_impl",
        "_is_torch_compile",
        "_is_hf_initialized",
        "gradient_checkpointing",
        "_gradient_checkpointing_func",
    ),
    *("peft_config", "generation_config", "_hf_peft_config_loaded", "_no_split_modules", "_caches"),
    *("_name_or_path", "name_or_path", "_commit_hash", "_diffusers_version", "transformers_version", "architectures"),
    "_use_default_values",  # of a diffusers config: names in the order of a set, another one in each process
    *("_feat_map", "_conv_idx", "_conv_num"),  # of Wan's autoencoder: what it remembers of the video before
    *("_enc_feat_map", "_enc_conv_idx", "_enc_conv_num"),
}
# Hooks that say where weights are kept, not what is computed.
_PLACEMENT = {
    *("AlignDevicesHook", "CpuOffload", "LayerwiseOffload", "GroupOffloadingHook", "LazyPrefetchGroupOffloadingHook"),
    *("LayerExecutionTrackerHook", "ContextParallelModelHook"),
}
_BY_CALL = ("truncation", "padding")
_SILENT = (torch.device, logging.Logger)
_LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib")})
_OURS = {"treesearch"}


class Unreadable(TypeError):
    """Something whose content is not known."""


def of(value: Any) -> str | None:
    """Digest of anything, None where a part of it has no content that can be read."""
    try:
        return _Reader().read(value).hex()
    except Unreadable:
        return None


def code(kind: type) -> str:
    """Digest of the code of a class and its bases, "" where an installed library or this one has all of it."""
    return _Reader()._code_of_class(kind).hex()


class _Reader:
    """Digests of values; each object is read once, and one that holds itself stands for itself."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[bytes, Any]] = {}  # with the object, lest its id be used again

    def read(self, value: Any) -> bytes:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, enum.Enum)):
            return _hash(type(value).__name__, repr(value))
        if isinstance(value, _SILENT):
            return _hash(type(value).__name__)
        if id(value) not in self.known:
            self.known[id(value)] = (_hash("itself"), value)
            self.known[id(value)] = (self._composite(value), value)
        return self.known[id(value)][0]

    def _composite(self, value: Any) -> bytes:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (np.ndarray, np.generic)):
            if value.dtype.hasobject:
                raise Unreadable("an array of objects")
            return _hash("array", value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes())
        if isinstance(value, (list, tuple, deque)):
            return _hash(type(value).__name__, *map(self.read, value))
        if isinstance(value, Mapping):
            return _hash("mapping", *self._items(value))
        if isinstance(value, (set, frozenset)):
            return _hash("set", *sorted(map(self.read, value)))
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, type):
            return _hash("class", value.__name__, self._code_of_class(value))
        if isinstance(value, types.ModuleType):
            return _hash("module", value.__name__)
        if callable(value) and (parts := self._callable(value)) is not None:
            return parts
        return self._object(value)

    def _items(self, values: Mapping[Any, Any], skip: Iterable[str] = ()) -> list[bytes]:
        """Digests of named values in the order of their names."""
        left = _BOOKKEEPING.union(skip)
        kept = [(repr(k), self.read(k), v) for k, v in values.items() if not (isinstance(k, str) and k in left)]
        return [part for _, key, v in sorted(kept, key=lambda item: item[:2]) for part in (key, self.read(v))]

    def _object(self, value: Any) -> bytes:
        kind = type(value)
        if hasattr(value, "tobytes") and hasattr(value, "mode"):  # an image
            return _hash("image", value.mode, value.size, value.tobytes())
        if isinstance(value, re.Pattern):
            return _hash("pattern", value.pattern, value.flags)
        if kind.__module__.startswith("tokenizers") and hasattr(value, "to_str"):
            told = json.loads(value.to_str())  # how long a text may be, and how it is filled up, is set by each call
            return _hash(
                kind.__name__, json.dumps({k: v for k, v in told.items() if k not in _BY_CALL}, sort_keys=True)
            )
        if kind.__name__ == "StateManager":  # of a hook: what it remembers of a call
            return _hash(kind.__name__)
        slots = [name for base in kind.__mro__ for name in getattr(base, "__slots__", ()) if hasattr(value, name)]
        if not slots and not hasattr(value, "__dict__"):
            raise Unreadable(f"a {kind.__module__}.{kind.__name__}")
        held = dict(getattr(value, "__dict__", {})) | {name: getattr(value, name) for name in slots if name[:2] != "__"}
        own = list(map(self.read, value)) if isinstance(value, (list, tuple, dict)) else []
        return _hash("object", kind.__name__, self._code_of_class(kind), *self._items(held), *own)

    # Tensors

    def _tensor(self, value: Tensor) -> bytes:
        parts = getattr(value, "__tensor_flatten__", None)  # of a quantiser's class: what it is made of
        if parts is not None:
            names, context = parts()
            inner = [self.read(getattr(value, name)) for name in names]
            return _hash("tensor", type(value).__name__, str(value.dtype), *names, *inner, self.read(context))
        extra = b"" if type(value) in (Tensor, nn.Parameter, nn.Buffer) else _hash(type(value).__name__)
        held = vars(value) if extra else {}
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            plain = value.detach().as_subclass(Tensor)
            if plain.device.type == "meta" or plain.layout != torch.strided or plain.is_quantized:
                raise Unreadable(f"a tensor on {plain.device.type} of layout {plain.layout}")
            return _hash("tensor", str(plain.dtype), tuple(plain.shape), _checksum(plain), extra, *self._items(held))

    # Networks

    def _module(self, module: nn.Module) -> bytes:
        if (inner := getattr(module, "_orig_mod", None)) is not None:  # compiled: the same computation
            return self.read(inner)
        held = vars(module)
        offloaded = _weights_map(module)
        tensors = {name: w for name, w in (module._parameters | module._buffers).items() if w is not None}
        tensors = {name: offloaded.get(name, w) for name, w in tensors.items()}
        skip = ("forward", "_hf_hook", "_old_forward", "_diffusers_hook") if _hooked(module) else ()
        return _hash(
            "network",
            type(module).__name__,
            self._code_of_class(type(module)),
            *(part for name, w in sorted(tensors.items()) for part in (name, self.read(w))),
            *(part for name, m in module._modules.items() if m is not None for part in (name, self.read(m))),
            *self._items(held, skip),
            *map(self.read, self._hooks(module)),
        )

    def _hooks(self, module: nn.Module) -> list[Any]:
        """Hooks in the order in which they are called."""
        own = [list(getattr(module, name).values()) for name in ("_forward_pre_hooks", "_forward_hooks")]
        ways = [len(getattr(module, name)) for name in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")]
        return [*own, ways if any(own) else [], [hook for hook in _added(module) if not _places(hook)]]

    # Functions

    def _callable(self, value: Any) -> bytes | None:
        if isinstance(value, functools.partial):
            return _hash("partial", *map(self.read, (value.func, value.args, value.keywords)))
        if isinstance(value, types.MethodType):
            return _hash("method", getattr(value, "__name__", ""), self.read(value.__func__), self.read(value.__self__))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, (types.BuiltinFunctionType, np.ufunc)):
            return _hash("builtin", value.__name__)
        return None

    def _function(self, function: types.FunctionType) -> bytes:
        cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        closed = map(self.read, (cells, function.__defaults__, function.__kwdefaults__))
        if _in_library(function.__module__, function.__code__.co_filename):
            return _hash("function", function.__qualname__, *closed)
        read = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
        return _hash("function", function.__qualname__, _code(function.__code__), *closed, *self._items(read))

    def _code_of_class(self, kind: type) -> bytes:
        """The methods of a class and its bases, of those that no installed library has."""
        own = [base for base in kind.__mro__ if not _in_library(base.__module__, _file(base))]
        functions = [(k, f) for base in own for k, held in sorted(vars(base).items()) for f in _written(held)]
        return _hash(*(part for k, f in functions if not _dunder(k) for part in (k, _code(f.__code__)))) if own else b""


def _hash(*parts: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode(errors="surrogatepass")
        digest.update(b"%d:" % len(data) + data)
    return digest.digest()


def _checksum(value: Tensor) -> bytes:
    """All of a tensor: as it is, or a large one by the sums of its blocks and a sample, added up where it is."""
    flat = value.contiguous().reshape(-1)
    if flat.numel() * flat.element_size() <= WHOLE:
        return _bytes(flat)
    picked = flat[:: max(1, len(flat) // SAMPLE)]
    if flat.storage_offset():
        flat = flat.clone()  # aligned to words
    data = flat.view(torch.uint8)
    end = len(data) - len(data) % (4 * BLOCK)
    sums = data[:end].view(torch.int32).view(-1, BLOCK).sum(1, dtype=torch.int64)
    return _bytes(sums) + _bytes(data[end:]) + _bytes(picked)


def _bytes(flat: Tensor) -> bytes:
    return flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _weights_map(module: nn.Module) -> Mapping[str, Tensor]:
    """Weights of a module whose own are on the meta device since a hook brings them when they are needed."""
    hook = getattr(module, "_hf_hook", None)
    found = next((h.weights_map for h in _parts(hook) if getattr(h, "weights_map", None) is not None), None)
    meta = [name for name, w in (module._parameters | module._buffers).items() if w is not None and w.is_meta]
    return {name: found[name] for name in meta} if found is not None else {}


def _hooked(module: nn.Module) -> bool:
    """Whether a library put its own `forward` before the module's, to call hooks that are read by themselves."""
    return any(name in vars(module) for name in ("_hf_hook", "_diffusers_hook"))


def _added(module: nn.Module) -> list[Any]:
    """Hooks of accelerate and of diffusers."""
    registry = getattr(module, "_diffusers_hook", None)
    named = [registry.hooks[name] for name in registry._hook_order] if registry is not None else []
    return [*_parts(getattr(module, "_hf_hook", None)), *named]


def _parts(hook: Any) -> list[Any]:
    return [] if hook is None else list(getattr(hook, "hooks", None) or [hook])


def _places(hook: Any) -> bool:
    return type(hook).__name__ in _PLACEMENT


def _filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _written(held: Any) -> list[types.FunctionType]:
    """Functions of an attribute of a class: a method, or what a property or another descriptor is made of."""
    names = ("fget", "fset", "func", "__func__")
    each = [held] if isinstance(held, types.FunctionType) else [getattr(held, name, None) for name in names]
    return [f for f in each if isinstance(f, types.FunctionType)]


def _names(code: types.CodeType) -> set[str]:
    """Names that a function and those inside it look up."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _code(code: types.CodeType) -> bytes:
    constants = [_code(c) if isinstance(c, types.CodeType) else _constant(c) for c in code.co_consts]
    return _hash(code.co_code, *code.co_names, *constants)


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _in_library(module: str | None, file: str) -> bool:
    """Whether code is of an installed library or of this one: it changes with their versions, which runs record."""
    return (module or "").partition(".")[0] in _OURS or file.startswith(_LIBRARIES) or file.startswith("<frozen")


def _file(kind: type) -> str:
    try:
        return inspect.getfile(kind)
    except (TypeError, OSError):  # built in, or typed at a prompt
        return _LIBRARIES[0] if kind.__module__ == "builtins" else ""


def _dunder(name: str) -> bool:
    return name.startswith("__") and name != "__call__"
