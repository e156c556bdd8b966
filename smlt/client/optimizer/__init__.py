"""How many workers with how much memory: what is tried, what is learnt, what is chosen, and whether the goal is kept."""
