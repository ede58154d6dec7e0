"""PIE-mini: edits of synthetic pictures whose masks are exact, judged by a program, with the metrics of PIE-Bench."""
