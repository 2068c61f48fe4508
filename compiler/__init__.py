"""From a source to an artifact: frontends, options, the driver and the command line."""
