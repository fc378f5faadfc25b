"""Guess first, then look: a prediction beside what was measured."""

import re


def reveal(guess: object, measured: float | str, unit: str = "", *, close: float = 0.0) -> None:
    """Print a guess beside what the cell above measured; `...` means that no guess was made.

    Numbers within `close` of what was measured count as right.
    """
    truth = f"{measured:g}{unit}" if isinstance(measured, int | float) else f"{measured}"
    if guess is ...:
        print(f"No guess yet. Measured: {truth}")
        return
    if isinstance(guess, str) and isinstance(measured, int | float):
        found = re.search(r"-?\d+\.?\d*", guess)  # "2 %", "about 0.5"
        guess = float(found.group()) if found else guess
    numbers = isinstance(guess, int | float) and isinstance(measured, int | float)
    right = abs(guess - measured) <= close if numbers else str(guess).strip().lower() == str(measured).strip().lower()
    said = f"{guess:g}{unit}" if isinstance(guess, int | float) else str(guess)
    print(f"You said {said}. Measured: {truth}. {'Well seen.' if right else 'Why?'}")
