"""Rules of servers on adapters: one file for each server, read in the server's source."""
