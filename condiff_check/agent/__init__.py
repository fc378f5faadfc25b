"""What runs beside a submission's code, in the sandbox. Nothing here knows a fact, a reference or a score.

It imports nothing of the course: while grading it is copied, as the package condiff_agent, to where no answer is.
"""
