"""What runs inside an environment that has vLLM: one file that needs nothing else of this package.

The folder is put on that interpreter's PYTHONPATH, so that vLLM's own worker processes find `fire_vllm.Extension`.
"""
