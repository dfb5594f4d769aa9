"""The configuration schema: frozen standard-library dataclasses, read from YAML and the command line."""
