"""What every pass stands on: our operators, graph helpers and region nodes."""
