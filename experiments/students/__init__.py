"""Few-step students: the shipped one, what targets are worth on beds with known samples, a search that trains one."""
