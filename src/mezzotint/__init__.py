"""Mezzotint: image-generation models as dedicated endpoints on your own hardware."""

__version__ = "0.1.0"
