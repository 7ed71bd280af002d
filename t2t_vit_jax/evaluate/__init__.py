"""Measures what weights are worth: accuracy on many sets, how reliable guesses are, and what features know."""
