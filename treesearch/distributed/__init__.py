"""The only place that knows Ray: workers, the pool, bundles and how they are shared out."""
