"""The stream transport: framed connections that routers hold open to expert actors."""
