"""Experiments: a matrix of worlds, settings, arms and seeds over ordinary runs, and what they say, how surely."""
