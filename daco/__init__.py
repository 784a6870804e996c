"""DACO: load concept dictionaries and steering SAEs, and steer multimodal LLMs with them."""

__version__ = "0.1.0"
