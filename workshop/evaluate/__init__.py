"""Scores a served folder, or a served model over the API, on texts and questions."""
