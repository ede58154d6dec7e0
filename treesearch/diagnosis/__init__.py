"""Whether to branch at all, and where: a pilot of stated cost, what it says of kernel and reward, what to type next."""
