"""Tests, laid out like the package; a package itself so that worker processes can import it by name."""
