"""nemodiff's version; pyproject.toml takes it from here, so a checkout that is not installed knows it too."""

__version__ = "0.1.0"
