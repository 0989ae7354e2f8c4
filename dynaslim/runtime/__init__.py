"""Running a network routed: the product. Each module is imported by name: not all need torch."""
