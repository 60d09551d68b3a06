"""What the controller knows: actors, pools, nodes, and what it wrote down."""
