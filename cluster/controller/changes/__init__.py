"""Changes that the controller makes by itself: rebalancing, scaling, relief."""
