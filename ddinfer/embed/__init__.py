"""Inside a program of the user's: generate, and splitting and gathering anything."""
