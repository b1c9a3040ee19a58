"""What a model and its cache would take, found out without loading them."""
