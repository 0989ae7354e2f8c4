"""Experiments on trained networks, their numbers (`cells/`), and the page of results."""
