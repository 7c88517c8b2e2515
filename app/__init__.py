"""The server: from an HTTP request to tokens and back."""
