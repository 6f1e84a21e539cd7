"""The command line: parser, commands and rendering. Only this package imports rich."""
