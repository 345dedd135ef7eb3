"""The command line as a person meets it: what it prints, what it writes, what it leaves behind."""
