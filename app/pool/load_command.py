"""From the settings to the first frame of a child."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from app.config import cache_folder, seconds
from app.messages import LoadModel

if TYPE_CHECKING:
    from app.config import ServeSettings, Speculate

_MIB = 1 << 20


def load_command(settings: ServeSettings, model_file: Path) -> LoadModel:
    """Return the frame. What is computed alone has one slot, keeps no prefixes and guesses nothing."""
    alone = settings.deterministic
    speculate: Speculate = "off" if alone else settings.speculate
    draft = settings.draft_model if speculate != "off" else ""
    return LoadModel(
        path=str(model_file.absolute()),
        slots=1 if alone else settings.parallel,
        context_length=_context_length(settings),
        threads=settings.threads,
        batch_size=settings.batch_size,
        device=settings.device,
        gpu_layers=settings.gpu_layers,
        itl_target=seconds(settings.itl_target),
        kv_tokens=0 if alone else settings.kv_tokens,
        prefix_memory_bytes=0 if alone else settings.cache_ram * _MIB,
        prefix_disk_bytes=0 if alone else settings.cache_disk * _MIB,
        prefix_folder=str(cache_folder(settings) / "prefixes"),
        cache_type=settings.cache_type,
        flash_attention=settings.flash_attn,
        micro_batch_size=settings.ubatch_size,
        deterministic=alone,
        speculate=speculate,
        draft_tokens=settings.draft_tokens,
        pooling=settings.pooling,
        draft_path=str(Path(draft).expanduser().absolute()) if draft else "",
    )


def _context_length(settings: ServeSettings) -> int:
    """Return the tokens of a slot, 0 for what the model knows; `kv_tokens` bounds it, also when there is one slot."""
    if settings.ctx_size and settings.kv_tokens:
        return min(settings.ctx_size, settings.kv_tokens)
    return settings.ctx_size or settings.kv_tokens
