"""SmolLM3: a Llama whose every fourth layer goes without rotary positions, which llama.cpp knows by itself."""

from __future__ import annotations

from typing import Any

from app.errors import CheckpointError
from quantize.families.llama import LlamaModel
from quantize.source import Source

_STEP = 4  # llama.cpp has no key for it

# what transformers' config class fills in when config.json is silent
_DEFAULTS: dict[str, dict[str, Any]] = {
    "smollm3": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    }
}


def open(source: Source) -> SmolLM3Model:  # noqa: A001 - every family is opened by this name
    """Read config.json. Raises `CheckpointError` that names the field at fault."""
    return SmolLM3Model(source)


class SmolLM3Model(LlamaModel):
    """A SmolLM3 model."""

    architecture = "smollm3"
    defaults = _DEFAULTS

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._check_rotary_layers()
        kinds = self._config.fields.get("layer_types")
        if kinds is not None and kinds != ["full_attention"] * len(kinds if isinstance(kinds, list) else ""):
            raise CheckpointError(
                f"{self._config.path}: layer_types is {kinds!r}; llama.cpp's SmolLM3 has full attention in all layers"
            )

    def _check_rotary_layers(self) -> None:
        config = self._config
        stated = config.fields.get("no_rope_layers")
        if stated is None:
            good = config.count("no_rope_layer_interval", _STEP) == _STEP
        else:
            good = isinstance(stated, list) and len(stated) == self.blocks
            good = good and all(bool(has) == ((layer + 1) % _STEP != 0) for layer, has in enumerate(stated))
        if not good:
            name = "no_rope_layer_interval" if stated is None else "no_rope_layers"
            raise CheckpointError(
                f"{config.path}: {name} is {config.fields[name]!r}; llama.cpp's SmolLM3 leaves out the rotary "
                f"positions of every fourth layer and no other"
            )
