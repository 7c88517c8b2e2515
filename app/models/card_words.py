"""A card in words: names and values, a line each, as `pestle show` prints them and FILE.card.md holds them. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from app.models.card import Card, Quality, Tensor

Row = tuple[str, str]


def card_rows(card: Card) -> Iterator[Row]:
    """Yield what is known of a file but its tensors; a name may be empty and then goes on with the one before."""
    recipe, source = card.recipe, card.source
    chosen = [f"{pattern}={name}" for pattern, name in recipe.overrides]
    chosen += [f"output={recipe.output}"] if recipe.output else []
    chosen += [f"embedding={recipe.embedding}"] if recipe.embedding else []
    yield "type", ", ".join([card.type, *chosen])
    yield "size", f"{card.file.bytes:,} bytes, {card.weights:,} weights, {card.bits_per_weight:.2f} bits a weight"
    yield "sha256", card.file.sha256
    yield "imatrix", f"{recipe.imatrix.name}, sha256 {recipe.imatrix.sha256}" if recipe.imatrix else "none"
    yield "source", f"{source.kind} {source.name}{f' at {source.revision}' if source.revision else ''}"
    for file in source.files:
        yield "", f"{file.name}, {file.bytes:,} bytes, sha256 {file.sha256 or 'not taken'}"
    yield "made", f"{card.made} by pestle {card.pestle}"
    yield "library", card.library
    if card.quality is None:
        yield "quality", "not measured"
    else:
        yield from _quality_rows(card.quality)


def worst_tensors(card: Card, count: int) -> list[tuple[float, Tensor]]:
    """Return the tensors with the largest relative errors, and these; none if they were not measured."""
    errors = [(tensor.relative_error, tensor) for tensor in card.tensors if tensor.relative_error]
    return sorted(errors, key=lambda pair: -pair[0])[:count]


def _quality_rows(quality: Quality) -> Iterator[Row]:
    mean, largest = f"{quality.kld_mean:.4f} ± {quality.kld_error:.4f} nats", f"largest {quality.kld_max:.4f}"
    yield "KLD", f"{mean}, 99th percentile {quality.kld_99:.4f}, {largest}"
    yield "same top", f"{quality.same_top:.2%}"
    before = f"the reference's is {quality.reference_perplexity:.3f}"
    yield "perplexity", f"{quality.perplexity:.3f} ± {quality.perplexity_error:.3f}; {before}"
    speeds = f"{quality.prompt_speed:.0f} tokens/s of a prompt, {quality.decode_speed:.1f} tokens/s of an answer"
    yield "speed", f"{speeds}; threads: {quality.threads} of {quality.machine}"
    chunks = f"{quality.chunks} chunks of {quality.chunk_tokens} tokens"
    yield "measured", f"over {quality.predictions} predictions in {quality.text} ({chunks})"
    yield "", f"against {quality.reference}"
