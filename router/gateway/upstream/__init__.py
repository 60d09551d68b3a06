"""The way to the routers: links, choice of a router, retries."""
