"""From a model's name to a loaded pipeline, and what this machine can host."""
