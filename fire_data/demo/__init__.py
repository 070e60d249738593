"""A small world, made on the spot, in which on-policy distillation visibly works on a CPU."""
