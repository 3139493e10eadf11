"""Optional accelerated ops. Imports only torch, triton and itself; `ImportError` where Triton is not installed."""

from .attention_pool import attention_pool

__all__ = ["attention_pool"]
