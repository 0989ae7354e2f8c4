"""Running a network routed: the product."""

from dynaslim.runtime.engine import Engine, RoutedOutput

__all__ = ["Engine", "RoutedOutput"]
