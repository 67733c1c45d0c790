"""From a config file to frozen settings, or to one line of error."""
