"""Arrays only: noise, the tree, selection, backup, weights, resampling. Knows no kernel, no reward and no disk."""
