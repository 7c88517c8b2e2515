"""Model files: what they are called and what their headers say."""
