"""Which children exist, and the way of a request to them and back."""
