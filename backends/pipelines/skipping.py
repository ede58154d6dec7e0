"""Whole layers left out of a call, by which skip-layer and auto-guidance have a weaker network to guide away from.

    SkipLayerGuidance   ε̃ + w (ε(c) - ε_skipped(c))
    AutoGuidance        ε_skipped(∅) + w (ε(c) - ε_skipped(∅))

Diffusers does it with hooks. Those return a block's states before its text whatever the block does, and ask it for an
argument called `hidden_states`: Qwen-Image's blocks return the text first, Z-Image's call their states `x`, and the
guided call fails. Here a layer answers with what it is given, at the places that diffusers' registry of blocks says. A
layer that is dropped out in part draws at random in every call, and is refused.

Sources: skipped layers are Stability AI's, for SD 3.5 (2024). Guiding a Diffusion Model with a Bad Version of Itself
(Karras et al., 2024).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from treesearch.backends.pipelines.parts import unwrapped

_STACKS = ("transformer_blocks", "blocks", "layers", "single_transformer_blocks", "temporal_transformer_blocks")
_CONFIGS = {"SkipLayerGuidance": "skip_layer_config", "AutoGuidance": "auto_guidance_config"}


def layers_of(guider: Any) -> list[Any]:
    """What a guider says of the layers that it leaves out; none for one that leaves out none.

    Raises:
        ValueError: layers that are dropped out at random.
    """
    found = getattr(guider, _CONFIGS.get(type(guider).__name__, ""), [])
    name = type(guider).__name__
    for config in found:
        if 0 < config.dropout < 1:
            raise ValueError(f"{name} has dropout={config.dropout}, which draws anew in every call, so that a step "
                             "is no function of its state: leave layers out whole, dropout=1.0")  # fmt: skip
    return found


class Weaker:
    """The pass of a guider in which whole layers are left out.

    Args:
        guider: a copy of the user's, which from here on leaves those layers to this.
    """

    def __init__(self, guider: Any) -> None:
        self.guider, configs = guider, layers_of(guider)
        self.layers = [each for each in configs if each.skip_attention and each.skip_ff and each.dropout == 1]
        self._off: list[Any] = []
        if self.layers:
            setattr(guider, _CONFIGS[type(guider).__name__], [each for each in configs if each not in self.layers])
            self._prepare, self._clean = guider.prepare_models, guider.cleanup_models
            guider.prepare_models, guider.cleanup_models = self._prepared, self._cleaned

    def _prepared(self, network: Any) -> None:
        self._prepare(network)
        if self._is_due():
            for block in (block for config in self.layers for block in blocks_of(network, config)):
                self._off.append((block, vars(block).get("forward")))
                block.forward = passed_by(block)

    def _cleaned(self, network: Any) -> None:
        self.put_back()
        self._clean(network)

    def put_back(self) -> None:
        """Have every layer in the network again."""
        while self._off:
            block, own = self._off.pop()
            vars(block).pop("forward")
            if own is not None:  # a hook's
                block.forward = own

    def _is_due(self) -> bool:
        """Whether the pass that is prepared is the weaker one."""
        if type(self.guider).__name__ == "AutoGuidance":
            return self.guider._is_ag_enabled() and self.guider.is_unconditional
        return self.guider._is_slg_enabled() and self.guider.is_conditional and self.guider._count_prepared > 1


def blocks_of(network: Any, config: Any) -> list[Any]:
    """The layers of a network that a config names.

    Raises:
        ValueError: there are no such ones.
    """
    network = unwrapped(network)
    names = _STACKS if config.fqn == "auto" else (config.fqn,)
    name = next((name for name in names if hasattr(network, name)), None)
    if name is None:
        raise ValueError(f"there is no stack of layers called {' or '.join(names)}")
    stack = getattr(network, name)
    indices = [config.indices] if isinstance(config.indices, int) else list(config.indices)
    if not indices or not all(0 <= i < len(stack) for i in indices):
        raise ValueError(f"layers {indices} of {name} are left out, expected some of 0..{len(stack) - 1}")
    return [stack[i] for i in indices]


def passed_by(block: Any) -> Callable[..., Any]:
    """A call of a block that returns what it is given."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    kind = type(unwrapped(block))
    places, taken = TransformerBlockRegistry.get(kind), inspect.signature(kind.forward)
    states, text = places.hidden_states_argument_name, places.encoder_hidden_states_argument_name
    states = states if states in taken.parameters else list(taken.parameters)[1]

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = taken.bind(block, *args, **kwargs).arguments
        if places.return_encoder_hidden_states_index is None:
            return given[states]
        out = {places.return_hidden_states_index: states, places.return_encoder_hidden_states_index: text}
        return tuple(given[out[i]] for i in range(len(out)))

    return forward
