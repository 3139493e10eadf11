"""Optional accelerated ops. Imports only torch, triton and itself."""
