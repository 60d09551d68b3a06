"""The HTTP surface: the app, the OpenAI-compatible routes, the OpenAPI document."""
