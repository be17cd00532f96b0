"""What guidance distillation costs and gains, measured: compute, latency, fidelity, and the report drawn from them.

`cost` counts multiply-accumulates on meta tensors, `latency` times pipelines round by round, `results` holds the
document that both go into, `report` draws it. Nothing heavy is imported until a function needs it.
"""
