"""The shapes of requests and responses, and what becomes of every field."""
