"""A network's layers from shallow to deep, as lists of parameter names.

Dang et al. do not define a layer; they mention the residual blocks of ResNet-18 (section III-A).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

GRANULARITIES = ("block", "module", "stage")

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHTED = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Embedding,
    nn.MultiheadAttention,
)
_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd)


@dataclass
class _Unit:
    """A piece of a layer. `starts` is false for norms and bare parameters, which join the layer before them."""

    names: list[str]
    starts: bool
    stage: tuple[object, ...] | None = field(default=None)  # equal neighbours form one stage; None: a stage of its own


def ordered_layers(network: nn.Module, granularity: str = "block") -> list[list[str]]:
    """Parameter names of each layer, shallow to deep; every trained parameter is in exactly one layer.

    granularity  block   stem, each residual, dense, encoder or conv block, head (ResNet-18: 10)
                 module  each conv or linear (ResNet-18: 21)
                 stage   all blocks of a chain, split at pooling (ResNet-18: 6)
    A norm or bare parameter (class token, layer scale) belongs to the layer before it or, at the front, to the first.
    Layers come in registration order, which in torchvision and timm matches the forward pass.
    """
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    repeated = _repeated_classes(network)
    units = _modules(network) if granularity == "module" else _blocks(network, "", repeated, None)
    layers: list[_Unit] = []
    waiting: list[str] = []  # norms and bare parameters before the first layer
    for unit in units:
        names = [name for name in unit.names if name in trained]
        same_stage = granularity == "stage" and layers and unit.stage is not None and unit.stage == layers[-1].stage
        if not names:
            continue
        if layers and (not unit.starts or same_stage):
            layers[-1].names += names
        elif unit.starts:
            layers.append(_Unit(waiting + names, True, unit.stage))
            waiting = []
        else:
            waiting += names
    return [unit.names for unit in layers] or [waiting]


def _modules(network: nn.Module) -> Iterator[_Unit]:
    """Every module with parameters of its own; attention is one module."""
    inside = ""
    for path, module in network.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside = f"{path}."
            yield _Unit(_names(module, path), True)
        else:
            own = [_join(path, name) for name, _ in module.named_parameters(recurse=False)]
            if own:
                yield _Unit(own, isinstance(module, _WEIGHTED))


def _blocks(
    module: nn.Module, path: str, repeated: set[type[nn.Module]], stage: tuple[object, ...] | None
) -> Iterator[_Unit]:
    """The blocks below `module`, in order; `stage` is inherited from an enclosing module called ...Stage."""
    own = [_join(path, name) for name, _ in module.named_parameters(recurse=False)]
    if own:
        yield _Unit(own, False)
    pools = 0
    for name, child in module.named_children():
        below = _join(path, name)
        if isinstance(child, _POOLS):
            pools += 1
        if not any(True for _ in child.parameters()):
            continue
        key = stage
        if key is None and path and type(module) in _CONTAINERS:
            key = (path, pools, type(child))
        if _is_leaf(child):
            yield _Unit(_names(child, below), isinstance(child, _WEIGHTED), key)
        elif _is_block(child, repeated):
            yield _Unit(_names(child, below), True, key)
        else:
            inner = stage or ((below,) if _is_stage(child) else None)
            yield from _blocks(child, below, repeated, inner)


def _is_block(module: nn.Module, repeated: set[type[nn.Module]]) -> bool:
    """Whether a module with children counts as one layer.

    A plain container does if it is a conv block: leaves only, exactly one of them a conv or linear. Any other module
    does if its class occurs repeatedly, unless it is called a stage, or if it contains no chain.
    """
    if type(module) in _CONTAINERS:
        return _is_conv_block(module)
    if _is_stage(module):
        return False
    return type(module) in repeated or not any(_is_chain(part) for part in module.modules())


def _is_conv_block(module: nn.Module) -> bool:
    children = list(module.children())
    return all(_is_leaf(child) for child in children) and sum(isinstance(child, _WEIGHTED) for child in children) == 1


def _is_chain(module: nn.Module) -> bool:
    """A plain container with several blocks or several convs."""
    if type(module) not in _CONTAINERS:
        return False
    children = list(module.children())
    composite = sum(not _is_leaf(child) and any(True for _ in child.parameters()) for child in children)
    return composite >= 2 or sum(isinstance(child, _WEIGHTED) for child in children) >= 2


def _is_stage(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Stage")


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, _WEIGHTED) or not any(True for _ in module.children())


def _repeated_classes(network: nn.Module) -> set[type[nn.Module]]:
    seen: set[type[nn.Module]] = set()
    return {type(module) for module in network.modules() if type(module) in seen or seen.add(type(module))}  # type: ignore[func-returns-value]


def _names(module: nn.Module, path: str) -> list[str]:
    return [_join(path, name) for name, _ in module.named_parameters()]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
