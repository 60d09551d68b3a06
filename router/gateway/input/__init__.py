"""What a request is and whether it can be served: models, validation, templates, grammars."""
