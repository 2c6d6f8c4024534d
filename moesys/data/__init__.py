"""Text to tokens to batches: `prepare` writes a folder once, `loader` reads it on every rank."""
