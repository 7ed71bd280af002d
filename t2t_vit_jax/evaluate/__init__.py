"""What weights are worth: their accuracy on many sets, how far it can be relied on, and what their features know."""
