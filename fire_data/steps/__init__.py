"""The stages of a round over a run directory: rollout, score, weigh, train, evaluate, and the loop over all of them."""
