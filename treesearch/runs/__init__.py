"""The only place that touches the disk: run folders, state shards, identity."""
