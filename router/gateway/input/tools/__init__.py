"""Tool calls and reasoning of chat models: formats, parsers, grammars, and the checks of both."""
