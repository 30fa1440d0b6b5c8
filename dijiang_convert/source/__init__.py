"""Where models come from: an alias, a folder or the Hub."""
