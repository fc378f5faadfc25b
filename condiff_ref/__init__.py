"""The reference of the condiff course: conditional diffusion models that read like their papers.

Start with `schedules` and `predictions`, meet the exact world in `mixture`, then `guidance` and `samplers`; `unet`,
`train` and `metrics` take the same ideas to pictures.
"""
