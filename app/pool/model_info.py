"""What is known of a model's file before anything is loaded: its type, and its card if it has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from app.errors import PestleError
from app.models.embedded_card import find_card
from app.models.facts import facts_of, open_header
from app.observability.logging import get_logger
from app.pool.request import ModelInfo

if TYPE_CHECKING:
    from pathlib import Path

    from app.models.card import Card
    from app.models.gguf import Header

_log = get_logger(__name__)


def model_info(model_file: Path, model_id: str) -> ModelInfo:
    """Return the model before its children have loaded it; of a file that can't be read they will complain."""
    info = ModelInfo(id=model_id, created=int(model_file.stat().st_mtime))
    try:
        header = open_header(model_file)
        card = _own_card(header)
    except PestleError as error:
        _log.warning("nothing is shown of the model's file or card", extra={"reason": error.message})
        return info
    facts = facts_of(header)
    return msgspec.structs.replace(
        info,
        type=card.type if card else next(iter(facts.types), ""),
        file_bytes=facts.bytes,
        trained_context=facts.context or 0,
        card=_summary(card) if card else None,
    )


def _own_card(header: Header) -> Card | None:
    found = find_card(header)
    if found is None:
        return None
    card, mismatch = found
    if mismatch is not None:
        _log.warning("the card beside the model is not shown: it is another file's", extra={"reason": mismatch})
        return None
    return card


def _summary(card: Card) -> dict[str, Any]:
    """Return the card without its tensors."""
    quality = None if card.quality is None else msgspec.structs.asdict(card.quality)
    return {
        "type": card.type,
        "bytes": card.file.bytes,
        "sha256": card.file.sha256,
        "bits_per_weight": round(card.bits_per_weight, 4),
        "source": {"kind": card.source.kind, "name": card.source.name, "revision": card.source.revision},
        "imatrix": None if card.recipe.imatrix is None else card.recipe.imatrix.name,
        "library": card.library,
        "made": card.made,
        "quality": quality,
    }
