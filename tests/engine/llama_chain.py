"""llama.cpp's own sampler chain, in the order of its default, as the measure for ours."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from app.llama.library import load
from app.messages import Sampling

_ENTRY = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])


def probabilities(
    row: np.ndarray, sampling: Sampling, history: np.ndarray, vocabulary: Any = None
) -> tuple[np.ndarray, int]:
    """Return the probability of each token, shape (vocabulary,), and the token that was drawn.

    Without a `llama_vocab` DRY has no breakers. XTC acts always or never: give it the probability 1 or 0.
    """
    llama = load()
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    for sampler in _samplers(llama, sampling, len(row), len(history), vocabulary):
        llama.llama_sampler_chain_add(chain, sampler)
    for token in history.tolist():
        llama.llama_sampler_accept(chain, token)
    entries = np.zeros(len(row), _ENTRY)
    entries["id"] = np.arange(len(row))
    entries["logit"] = row
    pointer = entries.ctypes.data_as(ctypes.POINTER(llama.llama_token_data))
    array = llama.llama_token_data_array(pointer, len(row), -1, False)
    llama.llama_sampler_apply(chain, ctypes.byref(array))
    start = (ctypes.addressof(array.data.contents) - entries.ctypes.data) // _ENTRY.itemsize  # XTC moves it
    left = entries[start : start + array.size]
    result = np.zeros(len(row))
    result[left["id"]] = left["p"]
    llama.llama_sampler_free(chain)
    return result, int(left["id"][array.selected])


def greedy(row: np.ndarray) -> int:
    """Return what llama.cpp's greedy sampler takes."""
    llama = load()
    sampler = llama.llama_sampler_init_greedy()
    entries = np.zeros(len(row), _ENTRY)
    entries["id"] = np.arange(len(row))
    entries["logit"] = row
    array = llama.llama_token_data_array(
        entries.ctypes.data_as(ctypes.POINTER(llama.llama_token_data)), len(row), -1, False
    )
    llama.llama_sampler_apply(sampler, ctypes.byref(array))
    llama.llama_sampler_free(sampler)
    return int(entries["id"][array.selected])


def _samplers(llama: Any, sampling: Sampling, size: int, length: int, vocabulary: Any) -> list[Any]:
    biases = (llama.llama_logit_bias * max(len(sampling.logit_bias), 1))(*sampling.logit_bias.items())
    texts = [text.encode() for text in sampling.dry_sequence_breakers] if vocabulary else []
    last_n, dry_last_n = (
        length if window < 0 else window for window in (sampling.repeat_last_n, sampling.dry_penalty_last_n)
    )
    return [
        llama.llama_sampler_init_logit_bias(size, len(sampling.logit_bias), biases),
        llama.llama_sampler_init_penalties(
            size, last_n, sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
        ),
        llama.llama_sampler_init_dry(
            vocabulary,
            sampling.dry_multiplier,
            sampling.dry_base,
            sampling.dry_allowed_length,
            dry_last_n,
            (ctypes.c_char_p * max(len(texts), 1))(*texts),
            len(texts),
        ),
        llama.llama_sampler_init_top_k(sampling.top_k),
        llama.llama_sampler_init_typical(sampling.typical_p, 0),
        llama.llama_sampler_init_top_p(sampling.top_p, 0),
        llama.llama_sampler_init_min_p(sampling.min_p, 0),
        llama.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, 0, 1),
        llama.llama_sampler_init_temp(sampling.temperature),
        llama.llama_sampler_init_dist(1),
    ]
