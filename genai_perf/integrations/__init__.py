"""The only place that imports transformers and what belongs to it, and only when called."""
