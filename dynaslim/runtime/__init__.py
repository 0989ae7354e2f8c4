"""Running a network routed: the product."""

from dynaslim.runtime.engine import Engine, RoutedOutput
from dynaslim.runtime.extract import extract, extract_segment

__all__ = ["Engine", "RoutedOutput", "extract", "extract_segment"]
