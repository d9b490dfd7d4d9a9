"""The words that may stand in each other's place."""
