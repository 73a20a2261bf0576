"""Models on disk: a tiny random Qwen3-VL, and loading of any Qwen3-VL folder."""
