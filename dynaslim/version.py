"""The version of the package, where every module can import it without the package's own names."""

__version__ = "0.1.0"
