"""The stream transport: open connections from routers to expert actors that carry frames."""
