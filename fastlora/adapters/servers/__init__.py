"""What servers do with an adapter: one file of rules for each, read in the server's source."""
