"""ggml's RPC back end; kvmerge loads the module in this folder."""

__version__ = "0.1.0"
