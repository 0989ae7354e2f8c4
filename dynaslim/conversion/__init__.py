"""Conversion of a user's trained network into a dynamic slimmable one."""

from dynaslim.conversion.build import Conversion, convert

__all__ = ["Conversion", "convert"]
