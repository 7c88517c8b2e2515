"""The worker child: weights, KV cache and sampling of one loaded model."""
