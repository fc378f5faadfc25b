"""Exercises that name the mistake: check("01.2", q_sample) says which facts hold, and what went wrong."""

from .checking import check
from .predict import reveal

__all__ = ["check", "reveal"]
