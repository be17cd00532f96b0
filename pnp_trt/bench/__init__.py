"""Benchmarks of guidance distillation: compute, latency and fidelity, and the report on them.

`cost` counts multiply-accumulates on meta tensors, `latency` times pipelines round by round, `results` puts both into
one document, and `report` renders it. Heavy packages are imported only by the functions that need them.
"""
