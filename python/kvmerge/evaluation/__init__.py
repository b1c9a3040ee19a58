"""Measure what merging costs in answers: tasks, methods, the run, and the table that it gives.

In the order of the data: `samples` (what is asked), `pocket_tasks`, `milebench` and `needles`
(where it comes from), `methods` (how the cache is merged), `reader` (one context, read once and
answered from many times), `run`, `answers` (what is written down), `scores`, `bootstrap`, `tables`,
`plot`.
"""
