"""Whether intervals of log Z hold it."""
